"""Several processes do what one does: the same losses, the same weights, to rounding.

Everything runs in float64, where rounding is 1e-16 and any error of substance stands out. The
processes are real, and talk through gloo; each group is started once and does all its runs."""

import json
import os
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_runs import SMALL
from torch import multiprocessing

import contrastive
import finetune
import mlm
from common import adamw
from options import InputError, leave

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
OPTIONS = [*SMALL[:-3], "--steps=20", "--batch-size=8", "--log-every=1", "--eval-every=0"]
OPTIONS += ["--precision=float64"]
PIECES = {  # how the share of a process goes through the model
    "whole": [],
    "micro-batches": ["--micro-batch-tokens=300"],
    "GradCache": ["--tokens-in-memory=0", "--micro-batch-tokens=300"],
    "GradCache, text by text": ["--tokens-in-memory=0", "--micro-batch-tokens=1"],
    "zero": ["--zero"],
}


RUNS = {  # the stages share most of their code: not all of them need all of these
    "mlm": ("whole", "micro-batches", "zero"),
    "contrastive": tuple(PIECES),
    "finetune": ("whole", "GradCache", "zero"),
}


def train(stage, data, out, *options):
    STAGES[stage].main([*OPTIONS, f"--data={data}", f"--out={out}", *options])


def result(out):
    """Losses by step, and all weights as one vector, in float64."""
    losses = [json.loads(line)["loss"] for line in open(out / "log.jsonl")]
    weights = torch.load(out / "state.pt", weights_only=True)["model"]
    return np.array(losses), torch.cat([w.flatten() for w in weights.values()]).numpy()


def work(rank, world, port, data, folder):
    """What one process of a group does: every run that the tests below look at."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    for stage in STAGES:
        for name in RUNS[stage]:
            train(stage, data, folder / f"{stage}-{world}-{name}", *PIECES[name])
    for stage in STAGES:  # begun by one process
        train(stage, data, folder / f"{stage}-resumed-by-{world}", "--resume", "--zero")
    said = []
    for init, resume in ((f"--init={folder}/other-{rank}", ()), ("", ["--resume"])):
        try:
            out = folder / (f"resume-{rank}" if resume else "never")
            train("contrastive", data, out, *[init] * (not resume), "--keep=all", *resume)
        except InputError as error:
            said.append(str(error))
    (folder / f"said-{world}-{rank}").write_text("\n".join(said))
    (folder / f"moments-{world}-{rank}").write_text(str(count_moments()))


def safe_work(rank, *arguments):
    try:
        work(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others would wait for it
    leave()


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """The folder of all runs: of one process (here), of two, and of four."""
    folder = tmp_path_factory.mktemp("processes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for stage in STAGES:
        for name in RUNS[stage]:
            train(stage, data, folder / f"{stage}-1-{name}", *PIECES[name])
        for world in (2, 4):
            train(stage, data, folder / f"{stage}-resumed-by-{world}", "--stop-after=10")
    for other in range(4):
        train("contrastive", data, folder / f"other-{other}", f"--seed={other}", "--steps=1")
    train("contrastive", data, folder / "resume-0", "--stop-after=10", "--keep=all")
    for world in (2, 4):
        port = 20_000 + int(np.random.default_rng().integers(20_000))
        arguments = (world, port, data, folder)
        multiprocessing.spawn(safe_work, arguments, nprocs=world)
    torch.set_num_threads(threads)
    return folder


CASES = [(world, stage, name) for world in (1, 2, 4) for stage in STAGES for name in RUNS[stage]]


@pytest.mark.parametrize(("world", "stage", "name"), CASES[1:])
def test_twenty_steps_are_those_of_one_process_with_the_whole_batch(world, stage, name, folder):
    losses, weights = result(folder / f"{stage}-{world}-{name}")
    expected_losses, expected_weights = result(folder / f"{stage}-1-whole")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert np.abs(weights - expected_weights).max() < 1e-6 * np.abs(expected_weights).max()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_more_processes_may_go_on_with_a_run_and_share_its_state(world, stage, folder):
    """Begun by one process, resumed by several with --zero: the data come as if nothing changed."""
    losses, weights = result(folder / f"{stage}-resumed-by-{world}")
    expected_losses, expected_weights = result(folder / f"{stage}-1-whole")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert np.abs(weights - expected_weights).max() < 1e-6 * np.abs(expected_weights).max()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_begin_with_other_checkpoints_all_stop(world, folder):
    for rank in range(world):
        said = (folder / f"said-{world}-{rank}").read_text().split("\n")
        assert said == [
            "processes begin with different weights: they read other checkpoints",
            f"process 1: there is no checkpoint directory {folder}/resume-1",
        ]
    assert not (folder / "never").exists(), "nothing is left behind"


def test_the_state_of_zero_is_what_one_optimizer_would_write(folder):
    """So a run may be resumed with and without it, on any number of processes."""
    whole, shared = (
        torch.load(folder / f"mlm-4-{name}" / "state.pt", weights_only=True)["optimizer"]
        for name in ("whole", "zero")
    )
    assert shared["state"].keys() == whole["state"].keys()
    for number, moments in whole["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(shared["state"][number][name], value)


@pytest.mark.parametrize("world", [2, 4])
def test_with_zero_a_process_keeps_its_share_of_the_state_only(world, folder):
    """Two moments of eight matrices of 100: 1,600 numbers, each in one process."""
    counts = [int((folder / f"moments-{world}-{rank}").read_text()) for rank in range(world)]
    assert counts == [1600 // world] * world


def count_moments():
    """Moments that AdamW keeps in this process of a small model, after a step with --zero."""
    model = torch.nn.ModuleList(torch.nn.Linear(10, 10, bias=False) for _ in range(8))
    optimizer = adamw(model, mlm.Config(zero=True), betas=(0.9, 0.98), eps=1e-6)
    for layer in model:
        layer.weight.grad = torch.ones(10, 10)
    optimizer.step()
    state = optimizer.optim.state.values()
    return sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in state)


@pytest.mark.parametrize("world", [3, 16])
def test_a_batch_has_to_divide_among_the_processes(world, data, tmp_path, monkeypatch):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": world, "WORLD_SIZE": world}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=f"--batch-size=8 does not divide by {world} processes"):
        train("mlm", data, tmp_path / "run")


def test_of_all_processes_only_the_first_says_what_is_wrong(data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={29_600}", ROOT / "mlm.py", *OPTIONS, f"--data={data}"]
    command += ["--batch-size=3", f"--out={tmp_path / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("mlm.py: --batch-size=3 does not divide by 2 processes\n") == 1
    assert "InputError" not in result.stderr, "what torchrun adds is a report of its own"
