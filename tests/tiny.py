"""Small things to test with: made here, in a moment, the same at every call."""

import contextlib
import json
import math
import os
import socket
import time

import numpy as np
import pytest
import torch
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive
import finetune
import mlm
from common.options import InputError
from common.run import Run
from data import prepare
from model import ModelConfig, NomicBert

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
SMALL = ["--hidden-size=64", "--num-hidden-layers=1", "--num-attention-heads=2"]
SMALL += ["--intermediate-size=64", "--steps=6", "--batch-size=8", "--log-every=1"]
SMALL += ["--eval-every=0"]


def cases(names, *rows):
    """parametrize, where each test's name says which of how many inputs it is. rows: one after the
    other, or a list of all."""
    rows = rows if len(rows) > 1 else list(rows[0])
    ids = [f"{i} of {len(rows)}" for i in range(1, len(rows) + 1)]
    return pytest.mark.parametrize(names, rows, ids=ids)


@contextlib.contextmanager
def refused(message):
    """Within it an InputError of one line is raised, in which `message` stands."""
    with pytest.raises(InputError, match=message) as error:
        yield
    assert "\n" not in str(error.value)


def tiny_model(tokenizer=None, cls=NomicBert, **shape):
    """A model with random weights that computes in float32; trained length 128."""
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size() if tokenizer else 320
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, **shape}
    shape = {"vocab_size": math.ceil(size / 64) * 64, "intermediate_size": 128, **shape}
    model = cls(ModelConfig(**{"trained_length": 128, **shape}))
    for parameter in model.parameters():  # larger than at the start of training: a sharper test
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    (model if cls is NomicBert else model.bert).tokenizer = tokenizer
    return model


def softmax_attention(q, k, v):
    """softmax(Q K^T / sqrt(D)) V for one text: (L, H, D) each -> (L, H, D)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def random_texts(lengths, seed=0):
    """Texts as token ids, one of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 300, length) for length in lengths]


def unit_rows(n, E=8, seed=0):
    """Random embeddings (n, E) at unit length."""
    rows = np.random.default_rng(seed).normal(size=(n, E)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def gradients(model):
    """The gradient of all weights, as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


class Stopped(Exception):
    pass


def train(stage, data, out, *options, stop_after=None, call=None):
    """Runs a stage in this process. Returns the losses of its log and the bytes of its weights.

    stop_after: the run ends there as if it were killed: at the end of this step, after a checkpoint
    was written if one was due. call: a function that is called there instead."""
    save = Run.save

    def save_and_stop(run, step):
        save(run, step)
        if step + 1 == stop_after:
            if call is None:
                raise Stopped
            call()

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(Run, "save", save_and_stop)
        stage.main([*SMALL, f"--data={data}", f"--out={out}", *options])
    return losses_of(out), (out / "model.safetensors").read_bytes()


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def write_pairs(folder, pairs, tokenizer, prefixes):
    """A source of (query, document)."""
    rows = ({"query": query, "document": document} for query, document in pairs)
    prepare.write_source(folder, rows, prefixes, tokenizer)


def losses_of(out):
    return [line["loss"] for line in read_jsonl(out / "log.jsonl") if "loss" in line]


def log_lines(out):
    return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").is_file() else 0


def wait_for_lines(out, count, is_running):
    """Waits until the log of a run has so many lines."""
    until = time.monotonic() + 120
    while log_lines(out) < count:
        assert is_running() and time.monotonic() < until
        time.sleep(0.002)


def start_group(world, work, *arguments):
    """Calls work(rank, world, *arguments) in so many processes, and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world, port, work, *arguments)
    multiprocessing.start_processes(join_group, arguments, world, start_method="fork")


def join_group(rank, world, port, work, *arguments):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    work(rank, world, *arguments)


class LargestTensor(TorchDispatchMode):
    """Within it, the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result
