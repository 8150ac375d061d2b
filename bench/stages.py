"""Training speed of each stage, and its share of the machine's rate of matrix products.

    python bench/stages.py                                       # the laptop preset: two minutes
    python bench/stages.py --preset=gpu --compile                # and any other option of a stage
    python bench/stages.py --stages=mlm --preset=paper --batch-size=256

Each stage runs for 12 steps (--steps), and this reads its log: the median step, without the first
two. Operations are the useful ones (model.training_flops). The rate to compare with is measured
before and after, on the matrices of one layer in the same type; the higher one counts.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import finetune
import mlm
from bench.shared import matrix_rate, print_head, print_machine, print_row, split_options
from common import run
from common.device import best_device, choose_dtype
from common.options import InputError, cli, read_options

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
WARM_UP = 2  # steps that do not count


@dataclass
class Options:
    stages: str = "mlm,contrastive,finetune"  # which to measure


def measure(stage, arguments, device):
    """Tokens per second, operations per second, and the matrix rate."""
    config, _ = read_options(stage.Config, arguments, stage.PRESETS)
    if config.steps <= WARM_UP:
        raise InputError(f"--steps={config.steps}: give more than {WARM_UP}")
    dtype = choose_dtype(config.precision, device)
    rate = matrix_rate(config, dtype, device)
    run.peak_flops = lambda device: rate  # so that the log has the share of it
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--log-every=1", "--eval-every=0", "--save-every=1e9", f"--out={folder}/run"]
        with contextlib.redirect_stdout(io.StringIO()):
            stage.main([*arguments, *quiet])
        records = [json.loads(line) for line in open(f"{folder}/run/log.jsonl")][WARM_UP:]
    speed, share = (
        statistics.median(record[key] for record in records)
        for key in ("tokens_per_second", "share_of_peak")
    )
    return speed, share * rate, max(rate, matrix_rate(config, dtype, device))


def main(arguments):
    own, others = split_options(Options, arguments)
    options, _ = read_options(Options, own)
    names, device = options.stages.split(","), best_device()
    if unknown := set(names) - set(STAGES):
        raise InputError(f"--stages: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    cuda = device.type == "cuda"
    print_machine(device, " ".join(others))
    titles = ("stage", "tokens/s", "MFLOP/token", "TFLOP/s", "matrix rate, TFLOP/s", "share")
    print_head(*titles, *["GPU memory, GiB"] * cuda)
    for name in names:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        speed, flops, rate = measure(STAGES[name], ["--steps=12", *others], device)
        cells = [f"{speed:,.0f}", f"{flops / speed / 1e6:.1f}", f"{flops / 1e12:.3f}"]
        cells += [f"{rate / 1e12:.3f}", f"{flops / rate:.0%}"]
        if cuda:
            cells.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f}")
        print_row(name, *cells)


if __name__ == "__main__":
    cli(main)
