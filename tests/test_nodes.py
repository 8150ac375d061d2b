"""Two nodes do what one process does: torchrun --nnodes=2, gloo, a shared folder.

The nodes are network namespaces of this machine, each with an address of its own and no other
network, and a virtual cable between them. That needs Linux, iproute2 and the superuser."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from tiny import SMALL, read_log, train

import contrastive
import finetune
import mlm

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
ADDRESSES = ("10.97.0.1", "10.97.0.2")


def ip(*arguments):
    return subprocess.run(("ip", *arguments), capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """The names of two namespaces that can reach each other."""
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    names = [f"nanoembed-{os.getpid()}-{i}" for i in range(2)]
    cables = [f"ne{os.getpid()}-{i}" for i in range(2)]
    cable = ("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    commands = [("netns", "add", name) for name in names] + [cable]
    for name, end, address in zip(names, cables, ADDRESSES, strict=True):
        inside = ("-n", name)
        commands += [("link", "set", end, "netns", name)]
        commands += [(*inside, "link", "set", end, "name", "wire")]
        commands += [(*inside, "addr", "add", f"{address}/24", "dev", "wire")]
        commands += [(*inside, "link", "set", end, "up") for end in ("wire", "lo")]
    try:
        for command in commands:
            if (done := ip(*command)).returncode:
                pytest.skip(f"no network namespaces: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start_agent(nodes, number, port, stage, *arguments):
    """torchrun with one process, on one of the nodes."""
    command = ["ip", "netns", "exec", nodes[number], sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint={ADDRESSES[0]}:{port}", "--max-restarts=3"]
    command += [f"--rdzv-conf=is_host={1 - number},keep_alive_interval=1"]
    command += [f"--local-addr={ADDRESSES[number]}", ROOT / f"{stage}.py", *SMALL, *arguments]
    settings = {"GLOO_SOCKET_IFNAME": "wire"}
    settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/scaling.md says why
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | settings, start_new_session=True, **pipes)


def check_equal(out, expected):
    losses = [[line["loss"] for line in read_log(run)] for run in (out, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_two_nodes_have_the_losses_of_one_process(stage, nodes, data, tmp_path):
    train(STAGES[stage], data, tmp_path / "alone", "--precision=float32")
    arguments = ["--precision=float32", f"--data={data}", f"--out={tmp_path}/two"]
    agents = [start_agent(nodes, number, 29_501, stage, *arguments) for number in range(2)]
    for agent in agents:
        _, errors = agent.communicate(timeout=120)
        assert agent.returncode == 0, errors[-2000:]
    check_equal(tmp_path / "two", tmp_path / "alone")


def test_a_node_that_was_lost_joins_again_and_ends_in_the_losses_of_one_process(
    nodes, data, tmp_path
):
    arguments = ["--precision=float32", "--steps=80", "--save-every=10"]
    train(contrastive, data, tmp_path / "alone", *arguments)
    arguments += [f"--data={data}", f"--out={tmp_path}/two"]
    agents = [start_agent(nodes, number, 29_502, "contrastive", *arguments) for number in range(2)]
    log, end = tmp_path / "two" / "log.jsonl", time.time() + 60
    while time.time() < end and (not log.is_file() or log.read_bytes().count(b"\n") < 15):
        time.sleep(0.05)
    for process in ip("netns", "pids", nodes[1]).stdout.split():
        os.kill(int(process), signal.SIGKILL)
    assert agents[1].wait() == -signal.SIGKILL, "it was not at its end"
    agents[1] = start_agent(nodes, 1, 29_502, "contrastive", *arguments)
    for agent in agents:
        _, errors = agent.communicate(timeout=120)
        assert agent.returncode == 0, errors[-2000:]
    check_equal(tmp_path / "two", tmp_path / "alone")
