"""Several processes do what one does: the same losses, the same weights, to rounding.

Everything runs in float64, where rounding is 1e-16 and an error of substance stands out. The
processes are real and talk through gloo. They are forked, so that they need not import anything."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import SMALL, STAGES, cases, losses_of, refused, start_group, train, wait_for_lines

import contrastive
import mlm
from common import distributed
from common.files import write_json
from common.options import InputError

FLOAT64 = ["--precision=float32", "--steps=20"]  # float32 means PyTorch's default type
PIECES = {  # how the share of a process goes through the model
    "whole": [],
    "micro-batches": ["--micro-batch-tokens=50"],
    "GradCache": ["--tokens-in-memory=0", "--micro-batch-tokens=50"],
}
# the stages share most of their code: not all of them need all of these
RUNS = [("mlm", "whole"), ("mlm", "micro-batches"), *(("contrastive", name) for name in PIECES)]
RUNS += [("finetune", "whole"), ("finetune", "GradCache")]


def train64(stage, data, out, *options, **more):
    pairs = ("--query-tokens=16", "--document-tokens=24")
    short = ("--seq-len=48",) if stage == "mlm" else pairs
    train(STAGES[stage], data, out, *FLOAT64, *short, *options, **more)


def train_all(world, data, folder):
    for stage, name in RUNS:
        train64(stage, data, folder / f"{stage}-{world}-{name}", *PIECES[name])


def train_in_group(rank, world, data, folder):
    """Every run that the tests below look at."""
    train_all(world, data, folder)
    for stage in STAGES:  # begun by one process
        train64(stage, data, folder / f"{stage}-continued-by-{world}")
    messages, never = [], folder / "never"
    differ = [(data, never, f"--lr={rank + 1}"), (data, never, f"--log-every={rank + 1}")]
    differ += [(folder / f"data-{rank}", never), (data, never, f"--init={folder}/other-{rank}")]
    for arguments in (*differ, (data, folder / f"mlm-1-whole-{rank}"), (data, never)):
        if arguments == (data, never):  # the last: other weights
            torch.manual_seed = lambda seed: torch.seed()
        with pytest.raises(InputError) as error:
            train64("contrastive", *arguments)
        messages.append(str(error.value))
    (folder / f"messages-{world}-{rank}").write_text("\n".join(messages))


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """The folder of all runs: of one process (this one), of two, and of four."""
    folder = tmp_path_factory.mktemp("processes")
    torch.set_default_dtype(torch.float64)
    try:
        train_all(1, data, folder)
        for world in (2, 4):
            for stage in STAGES:
                out = folder / f"{stage}-continued-by-{world}"
                train64(stage, data, out, "--save-every=10", stop_after=10)
        for other in range(4):
            train(contrastive, data, folder / f"other-{other}", f"--seed={other}", "--steps=1")
            write_json(folder / f"data-{other}" / "meta.json", {"number": other})
        write_json(folder / "mlm-1-whole-1" / "letter.json", "mine")
        for world in (2, 4):
            start_group(world, train_in_group, data, folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def check_equal(out, expected):
    """Whether two runs have the same losses and weights, to rounding."""
    assert len(losses_of(out)) == 20
    np.testing.assert_allclose(losses_of(out), losses_of(expected), rtol=1e-6)
    states = (torch.load(run / "state.pt", weights_only=True)["model"] for run in (out, expected))
    weights, others = (torch.cat([w.flatten() for w in state.values()]) for state in states)
    assert weights.dtype == torch.float64
    assert (weights - others).abs().max() < 1e-6 * others.abs().max()


CASES = [(world, *run) for world in (1, 2, 4) for run in RUNS]


@pytest.mark.parametrize(("world", "stage", "name"), CASES[1:])
def test_twenty_steps_equal_those_of_one_process_with_the_whole_batch(world, stage, name, folder):
    check_equal(folder / f"{stage}-{world}-{name}", folder / f"{stage}-1-whole")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_more_processes_may_continue_a_run_that_one_began(world, stage, folder):
    check_equal(folder / f"{stage}-continued-by-{world}", folder / f"{stage}-1-whole")


@pytest.mark.parametrize("world", [2, 4])
def test_all_processes_stop_with_the_same_message_if_they_differ_or_one_fails(world, folder):
    for rank in range(world):
        messages = (folder / f"messages-{world}-{rank}").read_text().split("\n")
        for name, message in zip(("lr", "log-every", "data", "init"), messages, strict=False):
            assert message.startswith(f"process 1 has another --{name} (")
        assert re.match("process 1: .*/mlm-1-whole-1 holds something other than a run", messages[4])
        assert messages[5].startswith("the processes have different weights") and len(messages) == 6
    assert not (folder / "never").exists(), "nothing is left behind"


GROUP = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
GROUP |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29510"}
WRONG = [("RANK", ""), ("RANK", "2"), ("RANK", "-1"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "x")]


@cases("name, value", *WRONG, ("MASTER_PORT", "x"), ("MASTER_ADDR", ""))
def test_wrong_or_missing_variables_of_torchrun_are_one_line(name, value, monkeypatch):
    for variable, text in (GROUP | {name: value}).items():
        monkeypatch.setenv(variable, text)
    with refused(name):
        distributed.start(8)


def torchrun(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *options], text=True, **pipes)


SLOW = """
import os, sys, time
sys.path.insert(0, {!r})
import mlm
from common.options import cli
time.sleep(3 * (os.environ["RANK"] == "0"))
cli(mlm.main)
"""


def test_the_first_process_alone_prints_what_is_wrong_even_if_it_is_the_last_to_fail(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(str(ROOT)))
    process = torchrun(tmp_path / "slow.py", "--batch-size=3")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("slow.py: --batch-size=3 does not divide by 2 processes\n") == 1
    assert "InputError" not in errors, "what torchrun adds is a report of its own"


def test_torchrun_continues_by_itself_after_a_process_was_killed(data, tmp_path):
    options, out = ["--steps=80", "--save-every=5"], tmp_path / "killed"
    start_group(2, lambda *_: train(mlm, data, tmp_path / "undisturbed", *options))
    options += [f"--data={data}", f"--out={out}"]
    process = torchrun("--max-restarts=2", ROOT / "mlm.py", *SMALL, *options)
    wait_for_lines(out, 12, lambda: process.poll() is None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children.split()[1]), signal.SIGKILL)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert "continuing" in shown and losses_of(out) == losses_of(tmp_path / "undisturbed")
