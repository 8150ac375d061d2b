"""Kills a run with SIGKILL again and again, and resumes it: does it end as if nothing had happened?

    python bench/faults.py                        # 20 kills of each stage, a few minutes
    python bench/faults.py --kills=200 --stages=mlm

A checkpoint is written after every step, and every other kill waits until a file is being written.
A killed run goes on with --resume, if it left a checkpoint, or else from the start. Its last
weights and its log have to equal those of an undisturbed run, bit for bit. The model is small: what
is put to the test is the plumbing.
"""

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
import contrastive
import finetune
import mlm
from options import InputError, read_options, run

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
SMALL = ["--hidden-size=64", "--num-hidden-layers=1", "--num-attention-heads=2"]
SMALL += ["--intermediate-size=64", "--batch-size=8", "--log-every=1", "--save-every=1"]


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    stages: str = "mlm,contrastive,finetune"  # which to kill
    kills: int = 20  # of each stage
    steps: int = 20  # of each run; one that ends before all kills is followed by another
    seed: int = 0  # of the moments


def start(stage, arguments, output):
    """Runs a stage in a process of its own, forked: it need not import everything again."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    code = 1
    try:
        stage.main(arguments)
        code = 0
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def ended(process):
    """The exit code of a process, or None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_or_end(process, out, delay, while_writing):
    """Kills a process after so many seconds: its exit code is -9, unless it ends before."""
    due, patience = time.monotonic() + delay, time.monotonic() + delay + 1
    while (code := ended(process)) is None:
        now = time.monotonic()
        writes = any(out.glob("*.tmp")) or any(out.glob("*/*.tmp"))
        if now > patience or (now > due and (writes or not while_writing)):
            os.kill(process, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0 if now > due else 0.001)
    return code


def result(out):
    """What two runs have to agree on: weights, and losses by step."""
    log = [line.split('"tokens_per_second"')[0] for line in open(out / "log.jsonl")]
    return (out / "model.safetensors").read_bytes(), log


def last_words(folder):
    """The end of what the runs printed, for an error message."""
    return (folder / "output").read_text()[-300:]


def torment(stage, options, folder):
    """(kills, kills in the middle of writing, runs) until there were enough kills.

    Raises InputError where a run fails to resume, or ends otherwise than the undisturbed one."""
    moments = random.Random(options.seed)
    common = [*SMALL, f"--data={options.data}", f"--steps={options.steps}"]
    with open(folder / "output", "w") as output:
        began = time.monotonic()
        reference = start(stage, [*common, f"--out={folder / 'reference'}"], output)
        if os.waitstatus_to_exitcode(os.waitpid(reference, 0)[1]):
            raise InputError(f"the undisturbed run failed: {last_words(folder)}")
        seconds = time.monotonic() - began
        kills = writing = runs = 0
        while kills < options.kills:
            runs += 1
            out = folder / f"killed-{runs}"
            code = -signal.SIGKILL
            while code == -signal.SIGKILL:
                resume = ["--resume"] * (out / "state.pt").is_file()
                process = start(stage, [*common, f"--out={out}", *resume], output)
                enough = kills >= options.kills
                delay = math.inf if enough else moments.uniform(0, seconds)
                code = kill_or_end(process, out, delay, while_writing=kills % 2)
                kills += code == -signal.SIGKILL
                writing += code == -signal.SIGKILL and any(out.rglob("*.tmp"))
            if code:
                raise InputError(f"after {kills} kills a run ended by itself: {last_words(folder)}")
            if result(out) != result(folder / "reference"):
                raise InputError(f"{stage.__name__}: run {runs} differs from the undisturbed one")
    return kills, writing, runs


def main(arguments):
    options, _ = read_options(Options, arguments)
    for name in options.stages.split(","):
        if name not in STAGES:
            raise InputError(f"--stages={options.stages}: the stages are {', '.join(STAGES)}")
        with tempfile.TemporaryDirectory() as folder:
            kills, writing, runs = torment(STAGES[name], options, Path(folder))
        print(
            f"{name}: {kills} kills, {writing} of them while a file was written; "
            f"{runs} runs ended with the bits of the undisturbed one",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
