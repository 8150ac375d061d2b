"""Training speed of each stage on this machine, and the share of its matrix-product rate reached.

    python bench/train.py                    # the laptop preset of each stage, about two minutes

Useful floating-point operations of a token, forward and backward, are counted from the shapes:
6 for each weight of a matrix that it passes, and 12 * C * L for attention among L tokens in each
layer; in stage 1 the head, for the share of tokens that are masked. The rate to compare with is
that of the products of one layer (the head's are not in it), in the same type and the same run.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import finetune
import mlm
from data import store
from model import fast_dtype
from options import read_options, run


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    steps: int = 12  # of each stage; the first two do not count


def matrix_rate(config, dtype, N=8192, seconds=1.0):
    """Operations per second of the matrix products of one layer, (N, C) x (C, 3C) and so on."""
    C, inner = config.hidden_size, config.intermediate_size
    shapes = [(C, 3 * C), (C, C), (C, inner), (C, inner), (inner, C)]
    pairs = [(torch.randn(N, a).to(dtype), torch.randn(a, b).to(dtype)) for a, b in shapes]
    operations, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for x, weight in pairs:
            x @ weight
            operations += 2 * x.numel() * weight.shape[1]
    return operations / (time.perf_counter() - began)


def operations_per_token(config, vocab_size, length, masked_share):
    """Useful operations of training on one token of a text of `length` tokens."""
    C, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    trunk = layers * (6 * (4 * C * C + 3 * C * inner) + 12 * C * length)
    return trunk + masked_share * 6 * (C * C + C * vocab_size)


def main(arguments):
    options, _ = read_options(Options, arguments)
    vocab_size = store.load_tokenizer(options.data).get_vocab_size()
    dtype = fast_dtype(torch.device("cpu"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}\n")
    print(
        f"{'stage':12}{'tokens/s':>10}{'MFLOP/token':>13}{'GFLOP/s':>9}"
        f"{'of measured':>13}{'share':>7}"
    )
    for stage in (mlm, contrastive, finetune):
        config = stage.Config(data=options.data)
        rate = matrix_rate(config, dtype)
        with tempfile.TemporaryDirectory() as folder:
            steps = [f"--steps={options.steps}", f"--out={folder}/run", f"--data={options.data}"]
            stage.main([*steps, "--log-every=1", "--eval-every=1000000"])
            records = [json.loads(line) for line in open(f"{folder}/run/log.jsonl")][2:-1]
        speed = statistics.median(record["tokens_per_second"] for record in records)
        texts = {"mlm": 1, "contrastive": 2, "finetune": 2 + getattr(config, "negatives", 0)}
        length = records[0]["tokens"] / config.batch_size / texts[stage.__name__]
        masked = getattr(config, "mask_probability", 0.0)
        operations = operations_per_token(config, vocab_size, length, masked)
        reached = speed * operations
        print(
            f"{stage.__name__:12}{speed:10,.0f}{operations / 1e6:13.1f}{reached / 1e9:9.0f}"
            f"{rate / 1e9:13.0f}{reached / rate:7.0%}"
        )


if __name__ == "__main__":
    run(main)
