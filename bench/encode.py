"""Speed of `encode` at the published size, against sentence-transformers with the same weights.

    python bench/encode.py                   # ten minutes on two cores
    python bench/encode.py --texts=1000      # steadier

Three sets of texts: a natural mix (log-normal lengths, median 70 tokens, up to 2,048), short ones
as queries are, and long ones. sentence-transformers twice: as it comes (float32, batches of 32),
and at its best here (half precision, the batch size that is fastest on a sample; it sorts by
length itself). All read the same directory and the same texts in one run, and see that they agree.

Speed is in tokens of the texts, padding not counted. The share is of the machine's own rate of
matrix products, measured in the same run on the shapes of one layer.
"""

import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stages import matrix_rate

from data import store
from estimate import operations_per_token
from model import Config, NomicBert
from options import read_options, run
from processes import best_device

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # of which sentence-transformers may choose


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder: texts are pieces of its training text
    texts: int = 256  # of the natural mix; the other sets have about as many tokens
    layers: int = 12  # of the model; 12 is the published one
    hidden_size: int = 768  # of the model; 768 is the published one
    rounds: int = 2  # how often ours and sentence-transformers' best are timed; the median counts
    seed: int = 0  # of texts and weights


def lengths_of(options):
    """name -> lengths in tokens of its texts."""
    rng = np.random.default_rng(options.seed)
    mix = np.exp(rng.normal(math.log(70), 1.0, options.texts)).clip(8, 2048)
    return {
        "natural mix": mix,
        "short, 6 to 20": rng.uniform(6, 20, max(4, int(mix.sum() / 26))),
        "long, 1,024 to 2,048": rng.uniform(1024, 2048, max(2, int(mix.sum() / 1536))),
    }


def texts_of(lengths, tokenizer, data, rng):
    """A piece of training text for each length."""
    ids = store.Source(f"{data}/stage1/train", tokenizer).columns["document"].tokens
    starts = rng.integers(0, len(ids) - 2048, len(lengths))
    pieces = [ids[i : i + int(n) - 2] for i, n in zip(starts, lengths, strict=True)]
    return [tokenizer.decode(piece.tolist()) for piece in pieces]


def operations(config, lengths):
    """Useful operations of one forward pass over texts of these lengths: a third of training's."""
    return sum(lengths) * operations_per_token(config, lengths) / 3


def timed(encode, texts):
    began = time.perf_counter()
    embeddings = encode(texts)
    return time.perf_counter() - began, embeddings


def best_batch_size(model, texts, rng):
    """The batch size with which sentence-transformers is fastest on a sixth of the texts."""
    sample = [texts[i] for i in rng.permutation(len(texts))[: max(4, len(texts) // 6)]]
    seconds = {
        size: timed(lambda t, size=size: model.encode(t, batch_size=size), sample)[0]
        for size in BATCH_SIZES
    }
    return min(seconds, key=seconds.get)


def main(arguments):
    from sentence_transformers import SentenceTransformer

    options, _ = read_options(Options, arguments)
    device = best_device()
    rng = np.random.default_rng(options.seed)
    tokenizer = store.load_tokenizer(options.data)
    torch.manual_seed(options.seed)
    size = options.hidden_size
    config = Config(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=size,
        num_hidden_layers=options.layers,
        num_attention_heads=size // 64,
        intermediate_size=4 * size,
    )
    model = NomicBert(config)
    model.tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = NomicBert.from_pretrained(folder, device=device)
        default = SentenceTransformer(folder, device=str(device))
        half = SentenceTransformer(folder, device=str(device), model_kwargs={"dtype": ours.dtype})
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {ours.dtype}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
    )
    for name, lengths in lengths_of(options).items():
        texts = texts_of(lengths, tokenizer, options.data, rng)
        counts = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts)]
        work = operations(config, counts)
        batch = best_batch_size(half, texts, rng)
        rates = []
        seconds, embeddings = {"ours": [], "best": [], "default": []}, {}
        for number in range(options.rounds):
            N = 2048 if device.type == "cpu" else 65_536  # where it is highest
            rates.append(matrix_rate(config, ours.dtype, device, N))
            for key, encode in (
                ("ours", ours.encode),
                ("best", lambda t: half.encode(t, batch_size=batch)),  # noqa: B023
                ("default", default.encode),
            ):
                if key == "default" and number:
                    continue  # it takes the most time, and its ratio is the largest
                elapsed, embeddings[key] = timed(encode, texts)
                seconds[key].append(elapsed)
        seconds = {key: statistics.median(values) for key, values in seconds.items()}
        titles = {
            "ours": "ours, as it comes",
            "best": f"sentence-transformers, half, batches of {batch}",
            "default": "sentence-transformers, as it comes",
        }
        rate = statistics.median(rates)
        print(
            f"\n{name}: {len(texts)} texts, {sum(counts):,} tokens, "
            f"median {np.median(counts):.0f}; matrix products alone {rate / 1e9:.0f} GFLOP/s"
        )
        print(f"{'':44}{'tokens/s':>10}{'GFLOP/s':>9}{'share':>7}{'ours is':>9}")
        for key, title in titles.items():
            reached = work / seconds[key]
            print(
                f"{title:44}{sum(counts) / seconds[key]:10,.0f}{reached / 1e9:9.0f}"
                f"{reached / rate:7.0%}{seconds[key] / seconds['ours']:8.2f}x",
                flush=True,
            )
        cosines = (embeddings["ours"] * embeddings["default"]).sum(1)
        print(f"smallest cosine between ours and theirs: {cosines.min():.4f}")


if __name__ == "__main__":
    run(main)
