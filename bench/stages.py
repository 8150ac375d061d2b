"""Training speed of each stage, and the share of the machine's matrix-product rate reached.

    python bench/stages.py                            # the laptop preset, about two minutes
    python bench/stages.py --preset=gpu --compile     # and what else a stage takes, such as
    python bench/stages.py --stages=mlm --preset=paper --batch-size=256 --compile

The stages themselves run, and this reads their logs. Useful floating-point operations are counted
from the shapes (estimate.py; GradCache's first forward pass is not useful). The rate to compare
with is that of the matrix products of one layer (the head's are not in it), in the same type,
before and after each stage: the higher one counts.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import finetune
import mlm
from data import store
from estimate import operations_per_token, sampled_lengths
from model import NomicBert, fast_dtype
from options import InputError, read_options, run
from processes import best_device

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}


def matrix_rate(config, dtype, device="cpu", N=8192, seconds=1.0):
    """Operations per second of the matrix products of one layer, (N, C) x (C, 3C) and so on."""
    C, inner = config.hidden_size, config.intermediate_size
    shapes = [(C, 3 * C), (C, C), (C, inner), (C, inner), (inner, C)]
    new = {"dtype": dtype, "device": device}
    pairs = [(torch.randn(N, a, **new), torch.randn(a, b, **new)) for a, b in shapes]
    operations, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for x, weight in pairs:
            y = x @ weight
            operations += 2 * x.numel() * weight.shape[1]
        y[0, 0].item()  # waits for a GPU
    return operations / (time.perf_counter() - began)


def measure(name, arguments, skipped):
    """(tokens/s, useful operations of a token, matrix rate, peak memory of a GPU) of a stage."""
    stage, device = STAGES[name], best_device()
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--log-every=1", "--eval-every=0", "--save-every=1000000"]
        out = f"{folder}/run"
        arguments = [*arguments, *quiet, f"--out={out}"]
        config, _ = read_options(stage.Config, arguments, stage.PRESETS)
        dtype = fast_dtype(device)
        N = 8192 if device.type == "cpu" else 65_536
        rate = matrix_rate(config, dtype, device, N)
        with contextlib.redirect_stdout(io.StringIO()):
            stage.main(arguments)
        rate = max(rate, matrix_rate(config, dtype, device, N))
        records = [json.loads(line) for line in open(f"{out}/log.jsonl")][skipped:-1]
        shape = NomicBert.from_pretrained(out).config
    if not records:
        raise InputError(f"--steps={config.steps}: give more than {skipped + 1}")
    speed = statistics.median(record["tokens_per_second"] for record in records)
    lengths, _ = sampled_lengths(name, config, store.load_tokenizer(config.data))
    copies = {"document": 1 + getattr(config, "negatives", 0)}
    every = np.concatenate([np.tile(n, copies.get(column, 1)) for column, n in lengths.items()])
    masked = getattr(config, "mask_probability", 0.0)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return speed, operations_per_token(shape, every, masked), rate, memory


def main(arguments):
    stages, skipped = list(STAGES), 2
    for argument in list(arguments):
        if argument.startswith("--stages="):
            arguments.remove(argument)
            stages = argument.removeprefix("--stages=").split(",")
    if unknown := set(stages) - set(STAGES):
        raise InputError(f"--stages: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    if not any(argument.startswith("--steps=") for argument in arguments):
        arguments = [*arguments, "--steps=12"]
    rows = [(name, *measure(name, arguments, skipped)) for name in stages]
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"\ntorch {torch.__version__}, {device}; options: {' '.join(arguments)}")
    print(
        f"{'stage':12}{'tokens/s':>11}{'MFLOP/token':>13}{'TFLOP/s':>9}{'of measured':>13}"
        f"{'share':>7}" + f"{'memory':>12}" * cuda
    )
    for name, speed, operations, rate, memory in rows:
        reached = speed * operations
        print(
            f"{name:12}{speed:11,.0f}{operations / 1e6:13.1f}{reached / 1e12:9.3f}"
            f"{rate / 1e12:13.3f}{reached / rate:7.0%}" + f"{memory / 2**30:8.1f} GiB" * cuda
        )


if __name__ == "__main__":
    run(main)
