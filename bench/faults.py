"""Kills a run with SIGKILL again and again: does it end with the same bits as one that was not?

    python bench/faults.py                        # 20 kills of each stage: some minutes
    python bench/faults.py --kills=200 --stages=mlm

A checkpoint is written after every step, and every other kill waits until a file is being written.
After a kill the same command continues. The last weights and the log have to equal those of an
undisturbed run.
"""

import json
import math
import os
import random
import signal
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
    seed: int = 0  # of the moments [0, 1e18]


def run_once(stage, arguments, out, delay=math.inf, rng=None):
    """Runs a stage in a forked process, which need not import everything again, and kills it after
    `delay` seconds; with an rng after that, at random while it writes a file. Returns whether it
    was killed, and whether it left a half-written file."""
    for left_over in out.rglob("*.tmp") if rng else ():  # of the kill before
        left_over.unlink()
    printed, due, ended = out.with_suffix(".txt"), time.monotonic() + delay, 0
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        try:
            stage.main([*arguments, f"--out={out}"])
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    while not ended:
        is_due = time.monotonic() > due
        if is_due and (rng is None or any(out.rglob("*.tmp")) and rng.random() < 0.05):
            os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, 0)
        else:
            ended, status = os.waitpid(process, os.WNOHANG)
            time.sleep(0 if is_due else 0.001)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise InputError(f"{stage.__name__} failed: {printed.read_text()[-300:]}")
    return code < 0, code < 0 and any(out.rglob("*.tmp"))


def result(out):
    """What two runs have to agree on: the weights, and the log without speeds."""
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    for line in log:
        line.update(tokens_per_second=None, share_of_peak=None)
    return (out / "model.safetensors").read_bytes(), log


def torment(name, options, folder):
    """Kills until it is enough. Returns kills, kills while a file was written, and runs.

    Raises InputError where a run does not continue, or differs from the undisturbed one."""
    stage, moments = choose_stages(name)[name], random.Random(options.seed)
    arguments = [*SMALL.split(), f"--data={options.data}", f"--steps={options.steps}"]
    kills = while_writing = runs = 0
    seconds = seconds_of(lambda: run_once(stage, arguments, folder / "reference"))
    while kills < options.kills:
        runs, killed, out = runs + 1, True, folder / f"killed-{runs + 1}"
        while killed:
            delay = moments.uniform(0, seconds) if kills < options.kills else math.inf
            wait = kills % 2 == 1
            killed, half_written = run_once(stage, arguments, out, delay, moments if wait else None)
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
