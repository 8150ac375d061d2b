"""Speed of `encode` at the published size, against sentence-transformers with the same weights.

    python bench/encode.py                   # seven minutes on two cores

sentence-transformers is measured at its best here: half precision where it is fast, and the fastest
batch size (it sorts by length itself). The batch size is chosen and the embeddings are compared on
a sixth of the texts. Padding does not count as tokens.
"""

import sys
import tempfile
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
from model import ModelConfig, NomicBert


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder: texts are pieces of its training text
    texts: int = 256  # of the natural mix; the other sets have about as many tokens [4, 1e6]
    layers: int = 12  # of the model
    hidden_size: int = 768  # of the model
    rounds: int = 2  # how often each is timed; the median counts


def main(arguments):
    options, _ = read_options(Options, arguments)
    from sentence_transformers import SentenceTransformer

    device, rng = best_device(), np.random.default_rng(0)
    tokenizer = load_tokenizer(options.data)
    torch.manual_seed(0)
    size = options.hidden_size
    shape = {"num_hidden_layers": options.layers, "hidden_size": size}
    shape |= {"num_attention_heads": max(1, size // 64), "intermediate_size": 4 * size}
    model = NomicBert(ModelConfig(-(-tokenizer.get_vocab_size() // 64) * 64, **shape))
    model.tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = NomicBert.from_pretrained(folder, device=device)
        kwargs = {"device": str(device), "model_kwargs": {"dtype": ours.dtype}}
        theirs = SentenceTransformer(folder, **kwargs)
    shared.print_machine(ours.dtype)
    shared.print_head("texts", "", "tokens/s", "time / ours", "smallest cosine")

    mix = shared.natural_mix(options.texts, rng)
    total = int(mix.sum())
    for title, lengths in {
        "natural mix": mix,
        "short, 6 to 20 tokens": rng.integers(6, 21, max(4, total // 13)),
        "long, 1,024 to 2,048": rng.integers(1024, 2049, max(2, total // 1536)),
    }.items():
        pieces = shared.pieces_of_text(options.data, tokenizer, lengths - 2, rng)  # [CLS] and [SEP]
        texts = [tokenizer.decode(piece.tolist()) for piece in pieces]
        tokens = sum(map(len, tokenizer.encode_batch_fast(texts)))
        sample = [texts[i] for i in rng.permutation(len(texts))[: max(4, len(texts) // 6)]]
        sizes = (1, 2, 4, 8, 16, 32)
        best = shared.fastest({n: partial(theirs.encode, sample, batch_size=n) for n in sizes})
        name = f"sentence-transformers, batches of {best}"
        encoders = {"ours": ours.encode, name: partial(theirs.encode, batch_size=best)}
        embeddings = [encode(sample) for encode in encoders.values()]  # warms up, too
        works = [partial(encode, texts) for encode in encoders.values()]
        times = np.median(shared.time_in_turns(works, options.rounds), 0)
        for name, found, seconds in zip(encoders, embeddings, times, strict=True):
            cells = f"{tokens / seconds:,.0f}", f"{seconds / times[0]:.2f}"
            cosine = (embeddings[0] * found).sum(1).min()
            shared.print_row(f"{title}: {len(texts):,} texts", name, *cells, f"{cosine:.4f}")


if __name__ == "__main__":
    cli(main)
