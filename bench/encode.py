"""Speed of `encode` at the published size, against sentence-transformers with the same weights.

    python bench/encode.py                   # ten minutes on two cores

sentence-transformers is measured twice: as it comes (float32, batches of 32), and at its best here
(half precision, the batch size that is fastest on a sample; it sorts by length itself). All read
the same directory and the same texts, and their embeddings are compared. Speed is in tokens of the
texts, padding not counted. Share: of the rate of matrix products on the shapes of one layer.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import shared
from common.device import best_device
from common.files import load_tokenizer
from common.options import cli, read_options
from model import NomicBert, training_flops


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder: texts are pieces of its training text
    texts: int = 256  # of the natural mix; the other sets have about as many tokens [4, 1e6]
    layers: int = 12  # of the model
    hidden_size: int = 768  # of the model
    rounds: int = 2  # how often each is timed, but theirs as it comes; the median counts


def timed(encode, texts):
    began = time.perf_counter()
    embeddings = encode(texts)
    return time.perf_counter() - began, embeddings


def main(arguments):
    options, _ = read_options(Options, arguments)
    from sentence_transformers import SentenceTransformer

    device, rng = best_device(), np.random.default_rng(0)
    tokenizer = load_tokenizer(options.data)
    torch.manual_seed(0)
    vocab_size = -(-tokenizer.get_vocab_size() // 64) * 64
    shape = shared.published_shape(options.layers, options.hidden_size, vocab_size=vocab_size)
    model = NomicBert(shape)
    model.tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = NomicBert.from_pretrained(folder, device=device)
        default = SentenceTransformer(folder, device=str(device))
        half = SentenceTransformer(folder, device=str(device), model_kwargs={"dtype": ours.dtype})
    parameters = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    shared.print_machine(device, ours.dtype, parameters)
    shared.print_head("texts", "", "tokens/s", "GFLOP/s", "share", "time / ours", "smallest cosine")

    mix = shared.natural_mix(options.texts, rng)
    total = int(mix.sum())
    for title, lengths in {
        "natural mix": mix,
        "short, 6 to 20 tokens": rng.integers(6, 21, max(4, total // 13)),
        "long, 1,024 to 2,048": rng.integers(1024, 2049, max(2, total // 1536)),
    }.items():
        pieces = shared.pieces_of_text(options.data, tokenizer, lengths - 2, rng)  # [CLS] and [SEP]
        texts = [tokenizer.decode(piece.tolist()) for piece in pieces]
        counts = [len(encoding) for encoding in tokenizer.encode_batch_fast(texts)]
        flops = training_flops(shape, counts) / 3  # forward only
        rate = shared.matrix_rate(shape, ours.dtype, device)
        sample = [texts[i] for i in rng.permutation(len(texts))[: max(4, len(texts) // 6)]]
        tries = {size: partial(half.encode, batch_size=size) for size in (1, 2, 4, 8, 16, 32)}
        size = min(tries, key=lambda size: timed(tries[size], sample)[0])
        encoders = {
            "ours": ours.encode,
            f"sentence-transformers, half, batches of {size}": tries[size],
            "sentence-transformers, as it comes": default.encode,
        }
        ours.encode(texts[:8])  # a warm-up, as trying the batch sizes was for theirs
        taken, embeddings = {name: [] for name in encoders}, {}
        for number in range(options.rounds):
            for name, encode in encoders.items():
                if number == 0 or encode != default.encode:  # which takes the longest
                    seconds, embeddings[name] = timed(encode, texts)
                    taken[name].append(seconds)
        taken = {name: statistics.median(seconds) for name, seconds in taken.items()}
        for name, seconds in taken.items():
            cosine = (embeddings["ours"] * embeddings[name]).sum(1).min()
            cells = [f"{sum(counts) / seconds:,.0f}", f"{flops / seconds / 1e9:,.0f}"]
            cells += [f"{flops / seconds / rate:.0%}", f"{seconds / taken['ours']:.2f}"]
            shared.print_row(f"{title}: {len(texts):,} texts", name, *cells, f"{cosine:.4f}")


if __name__ == "__main__":
    cli(main)
