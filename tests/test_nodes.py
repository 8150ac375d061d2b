"""Two nodes do what one process does: torchrun --nnodes=2, gloo, a shared folder.

The nodes are network namespaces of this machine, each with an address of its own and no other
network, and a virtual cable between them. That needs Linux, iproute2 and the superuser."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tiny import SMALL, STAGES, losses_of, train, wait_for_lines

ADDRESSES = ("10.97.0.1", "10.97.0.2")


def ip(*arguments):
    return subprocess.run(("ip", *arguments), capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """The names of two namespaces that can reach each other."""
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    names = [f"ne{os.getpid()}-{i}" for i in range(2)]  # of a node, and of its end of the cable
    commands = [f"netns add {name}" for name in names]
    commands += ["link add {} type veth peer name {}".format(*names)]
    for name, address in zip(names, ADDRESSES, strict=True):
        commands += [f"link set {name} netns {name}", f"-n {name} link set {name} name wire"]
        commands += [f"-n {name} addr add {address}/24 dev wire"]
        commands += [f"-n {name} link set {end} up" for end in ("wire", "lo")]
    try:
        for command in commands:
            if (done := ip(*command.split())).returncode:
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


def check(agents, folder):
    """Whether all end well, and with the losses of a run of one process."""
    for agent in agents:
        _, errors = agent.communicate(timeout=120)
        assert agent.returncode == 0, errors[-2000:]
    np.testing.assert_allclose(losses_of(folder / "two"), losses_of(folder / "alone"), rtol=1e-3)


@pytest.mark.parametrize("stage", ["mlm", "finetune"])
def test_two_nodes_have_the_losses_of_one_process(stage, nodes, data, tmp_path):
    train(STAGES[stage], data, tmp_path / "alone", "--precision=float32")
    arguments = ["--precision=float32", f"--data={data}", f"--out={tmp_path}/two"]
    agents = [start_agent(nodes, number, 29_501, stage, *arguments) for number in range(2)]
    check(agents, tmp_path)


def test_a_node_that_was_lost_joins_again_and_ends_in_equal_losses(nodes, data, tmp_path):
    arguments = ["--precision=float32", "--steps=80", "--save-every=10"]
    train(STAGES["contrastive"], data, tmp_path / "alone", *arguments)
    arguments += [f"--data={data}", f"--out={tmp_path}/two"]
    agents = [start_agent(nodes, number, 29_502, "contrastive", *arguments) for number in range(2)]
    wait_for_lines(tmp_path / "two", 15, lambda: agents[1].poll() is None)
    for process in ip("netns", "pids", nodes[1]).stdout.split():
        os.kill(int(process), signal.SIGKILL)
    assert agents[1].wait() == -signal.SIGKILL, "it was not at its end"
    agents[1] = start_agent(nodes, 1, 29_502, "contrastive", *arguments)
    check(agents, tmp_path)
