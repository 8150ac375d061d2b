"""Runs that are killed, asked to leave, or lose a process: they end as if nothing had happened.

`bench/faults.py` kills at many more moments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_runs import SMALL, train

import mlm

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def lines(out):
    log = Path(out, "log.jsonl")
    return log.read_text().splitlines() if log.is_file() else []


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("stage", ["mlm", "contrastive", "finetune"])
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(stage, data):
    """Four kills here, two of them while a file is written; twenty and more in bench/faults.py."""
    command = [sys.executable, ROOT / "bench" / "faults.py", "--kills=4", "--steps=8"]
    result = subprocess.run(
        [*command, f"--stages={stage}", f"--data={data}"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "ended with the bits of the undisturbed one" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_leave_saves_first_and_says_so(number, data, tmp_path):
    options = [*SMALL, f"--data={data}", "--steps=150", "--save-every=1000"]
    mlm.main([*options, f"--out={tmp_path / 'a'}"])
    command = [sys.executable, ROOT / "mlm.py", *options, f"--out={tmp_path / 'b'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(lines(tmp_path / "b")) >= 3, process)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    done = len(lines(tmp_path / "b"))
    assert process.returncode == 128 + number and 3 <= done < 150
    assert f"stopped by {number.name}" in shown and f"saved at step {done}" in shown
    mlm.main([*options, f"--out={tmp_path / 'b'}", "--resume"])
    a, b = ((tmp_path / run / "model.safetensors").read_bytes() for run in "ab")
    assert a == b


def test_a_line_of_the_log_that_a_kill_cut_is_written_again(data, tmp_path):
    losses, weights = train(mlm, data, tmp_path / "a")
    train(mlm, data, tmp_path / "b", "--stop-after=3")
    with open(tmp_path / "b" / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    assert train(mlm, data, tmp_path / "b", "--resume") == (losses, weights)


def test_torchrun_goes_on_by_itself_after_a_process_died(data, tmp_path):
    port = 20_000 + np.random.default_rng().integers(20_000)
    losses = {}
    for name, restarts in (("undisturbed", 0), ("killed", 2)):
        out = tmp_path / name
        command = [*TORCHRUN, "--nproc-per-node=2", f"--max-restarts={restarts}"]
        command += [f"--master-port={port}", ROOT / "mlm.py", *SMALL]
        command += [f"--data={data}", f"--out={out}", "--steps=100", "--save-every=5"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if restarts:
            wait_for(lambda out=out: len(lines(out)) >= 20, process)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(children.split()[1]), signal.SIGKILL)
        shown, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        losses[name] = [json.loads(line)["loss"] for line in lines(out)]
    assert "resuming" in shown and len(losses["killed"]) == 100
    assert losses["killed"] == losses["undisturbed"]
