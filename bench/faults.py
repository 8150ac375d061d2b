"""Kills a run with SIGKILL again and again: does it end with the same bits as one that was not?

    python bench/faults.py                        # 20 kills of each stage: some minutes
    python bench/faults.py --kills=200 --stages=mlm

A checkpoint is written after every step, and every other kill waits until a file is being written.
After a kill the same command continues. The last weights and the log have to equal those of an
undisturbed run. The model is small: what is tested is the plumbing.
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
from bench.shared import print_head, print_row
from bench.stages import STAGES
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


def start(stage, arguments, output):
    """Runs a stage in a forked process, which need not import everything again."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    try:
        stage.main(arguments)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def kill_or_end(process, out, due, rng=None):
    """Kills a process when it is due; with an rng after that, at random while it writes a file.
    Returns its exit code, and whether it left a half-written file."""
    while not (status := os.waitpid(process, os.WNOHANG))[0]:
        is_due = time.monotonic() > due
        if is_due and rng:
            is_due = any(out.rglob("*.tmp")) and rng.random() < 0.05
        elif not is_due:
            time.sleep(0.001)
        if is_due:
            os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)
            break
    return os.waitstatus_to_exitcode(status[1]), any(out.rglob("*.tmp"))


def result(out):
    """What two runs have to agree on: the weights, and the log without speeds."""
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    speeds = ("tokens_per_second", "share_of_peak")
    log = [{key: value for key, value in line.items() if key not in speeds} for line in log]
    return (out / "model.safetensors").read_bytes(), log


def torment(name, options, folder):
    """Kills until it is enough. Returns kills, kills while a file was written, and runs.

    Raises InputError where a run does not continue, or differs from the undisturbed one."""
    moments = random.Random(options.seed)
    arguments = [*SMALL.split(), f"--data={options.data}", f"--steps={options.steps}"]
    kills = while_writing = runs = 0
    with open(folder / "output", "w") as output:

        def run_once(out, delay, wait):
            for left_over in out.rglob("*.tmp") if wait else ():  # of the kill before
                left_over.unlink()
            process = start(STAGES[name], [*arguments, f"--out={out}"], output)
            due, rng = time.monotonic() + delay, moments if wait else None
            code, half_written = kill_or_end(process, out, due, rng)
            if code not in (0, -signal.SIGKILL):
                said = (folder / "output").read_text()[-300:]
                raise InputError(f"{name} failed after {kills} kills: {said}")
            return code < 0, code < 0 and bool(wait) and half_written

        began = time.monotonic()
        run_once(folder / "reference", math.inf, False)
        seconds = time.monotonic() - began
        while kills < options.kills:
            runs, killed = runs + 1, True
            while killed:
                delay = moments.uniform(0, seconds) if kills < options.kills else math.inf
                killed, half_written = run_once(folder / f"killed-{runs}", delay, kills % 2)
                kills += killed
                while_writing += half_written
            if result(folder / f"killed-{runs}") != result(folder / "reference"):
                raise InputError(f"{name}: run {runs} differs from the undisturbed one")
    return kills, while_writing, runs


def main(arguments):
    options, _ = read_options(Options, arguments)
    names = options.stages.split(",")
    if unknown := set(names) - set(STAGES):
        raise InputError(f"--stages: {', '.join(unknown)} is none of {', '.join(STAGES)}")
    print_head("stage", "kills", "while a file was written", "runs, all equal to the undisturbed")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print_row(name, *torment(name, options, Path(folder)))


if __name__ == "__main__":
    cli(main)
