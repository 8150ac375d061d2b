"""Kills a run with SIGKILL again and again: does it end with the bits of an undisturbed run?

    python bench/faults.py                        # 20 kills of each stage: some minutes
    python bench/faults.py --kills=200 --stages=mlm

A checkpoint is written after every step, and every other kill waits until a file is being written.
After a kill the same command continues. The last weights and the log must equal those of an
undisturbed run.
"""

import contextlib
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row, seconds_of
from bench.stages import choose_stages
from common.options import InputError, cli, read_options

SMALL = "--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=2 --intermediate-size=64"
SMALL += " --batch-size=8 --log-every=1 --eval-every=0 --save-every=1"


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    stages: str = "mlm,contrastive,finetune"  # which to kill
    kills: int = 20  # of each stage
    steps: int = 20  # of each run; one that ends before all kills is followed by another


def train_silently(stage, arguments):
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            stage.main(arguments)


def run_once(stage, arguments, out, delay=math.inf, rng=None):
    """Runs a stage in a forked process, which need not import everything again, and kills it after
    `delay` seconds; with an rng, at a random moment after that while it writes a file. Returns
    whether it was killed, and whether it left a half-written file."""
    for left_over in out.rglob("*.tmp"):
        left_over.unlink()
    job, due = (stage, [*arguments, f"--out={out}"]), time.monotonic() + delay
    process = multiprocessing.get_context("fork").Process(target=train_silently, args=job)
    process.start()
    while process.is_alive():
        is_due = time.monotonic() > due
        if is_due and (rng is None or any(out.rglob("*.tmp")) and rng.random() < 0.05):
            process.kill()
            process.join()
        time.sleep(0 if is_due else 0.001)
    if process.exitcode > 0:
        raise InputError(f"{stage.__name__} failed, with the error above")
    return process.exitcode < 0, process.exitcode < 0 and any(out.rglob("*.tmp"))


def result(out):
    """What two runs must agree on: the weights, and the log without speeds."""
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    for line in log:
        line.update(tokens_per_second=None, share_of_peak=None)
    return (out / "model.safetensors").read_bytes(), log


def torment(name, options, folder):
    """Kills a stage options.kills times. Returns kills, kills while a file was written, and runs.

    Raises InputError where a run does not continue, or differs from the undisturbed one."""
    stage, rng = choose_stages(name)[name], random.Random(0)
    arguments = [*SMALL.split(), f"--data={options.data}", f"--steps={options.steps}"]
    kills = while_writing = runs = 0
    seconds = seconds_of(lambda: run_once(stage, arguments, folder / "reference"))
    while kills < options.kills:
        runs, killed, out = runs + 1, True, folder / f"killed-{runs + 1}"
        while killed:
            delay = rng.uniform(0, seconds) if kills < options.kills else math.inf
            wait = kills % 2 == 1
            killed, half_written = run_once(stage, arguments, out, delay, rng if wait else None)
            kills += killed
            while_writing += wait and half_written
        if result(out) != result(folder / "reference"):
            raise InputError(f"{name}: run {runs} differs from the undisturbed one")
    return kills, while_writing, runs


def main(arguments):
    options, _ = read_options(Options, arguments)
    print_head("stage", "kills", "while a file was written", "runs, all equal to the undisturbed")
    for name in choose_stages(options.stages):
        with tempfile.TemporaryDirectory() as folder:
            print_row(name, *torment(name, options, Path(folder)))


if __name__ == "__main__":
    cli(main)
