"""Training speed of each stage, and its share of the machine's rate of matrix products.

    python bench/stages.py                                       # the laptop preset: two minutes
    python bench/stages.py --preset=gpu --compile                # and any other option of a stage
    python bench/stages.py --stages=mlm --preset=paper --batch-size=256

Each stage runs for 12 steps (--steps). From its log comes the median step, without the first two.
Operations are the useful ones (common/device.py). The matrix rate is measured before and after,
on the matrices of one layer in the same type; the higher one counts.
"""

import contextlib
import io
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
from common.files import read_json_lines
from common.options import InputError, cli, read_options

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}


@dataclass
class Options:
    stages: str = "mlm,contrastive,finetune"  # which to measure


def measure(stage, arguments, device):
    """Tokens per second, operations per second, and the matrix rate."""
    config, _ = read_options(stage.Config, arguments, stage.PRESETS)
    if config.steps <= 2:  # which do not count
        raise InputError(f"--steps={config.steps}: give more than 2")
    dtype = choose_dtype(config.precision, device)
    rate = matrix_rate(config, dtype, device)
    run.peak_flops = lambda device: rate  # so that the log has the share of it
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--log-every=1", "--eval-every=0", "--save-every=1e9", f"--out={folder}/run"]
        with contextlib.redirect_stdout(io.StringIO()):
            stage.main([*arguments, *quiet])
        records = [record for _, record in read_json_lines(f"{folder}/run/log.jsonl")][2:]
    speed = statistics.median(record["tokens_per_second"] for record in records)
    share = statistics.median(record["share_of_peak"] for record in records)
    return speed, share * rate, max(rate, matrix_rate(config, dtype, device))


def main(arguments):
    own, others = split_options(Options, arguments)
    options, _ = read_options(Options, own)
    device, names = best_device(), options.stages.split(",")
    if set(names) - set(STAGES):
        raise InputError(f"--stages={options.stages}: give some of {','.join(STAGES)}")
    cuda = device.type == "cuda"
    print_machine(*others)
    titles = ("stage", "tokens/s", "MFLOP/token", "TFLOP/s", "matrix rate, TFLOP/s", "share")
    print_head(*titles, "GPU memory, GiB")
    for name in names:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        speed, flops, rate = measure(STAGES[name], ["--steps=12", *others], device)
        cells = [f"{speed:,.0f}", f"{flops / speed / 1e6:.1f}", f"{flops / 1e12:.3f}"]
        cells += [f"{rate / 1e12:.3f}", f"{flops / rate:.0%}"]
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else ""
        print_row(name, *cells, memory)


if __name__ == "__main__":
    cli(main)
