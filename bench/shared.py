"""What several benches share: tables, timing, texts of a natural mix of lengths, matrix rate."""

import contextlib
import json
import math
import re
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.device import best_device, device_name
from common.files import write_text
from common.options import InputError
from data.store import Source


def print_row(*cells):
    """A row of a Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(*titles):
    print_row(*titles)
    print_row("---", *["---:"] * (len(titles) - 1))


def print_machine(*more):
    print(", ".join(map(str, [f"torch {torch.__version__}", device_name(best_device()), *more])))
    print()


def keep(path, work):
    """What work() returns, kept in a JSON file: a bench that is started again goes on, and several
    may share a folder."""
    if not path.is_file():
        write_text(path, json.dumps(work()))
    return json.loads(path.read_text())


def keep_settings(out, *settings):
    """Raises InputError where the folder `out` has results of other settings."""
    if (before := keep(Path(out, "settings.json"), lambda: settings)) != [*settings]:
        raise InputError(f"{out} has results of {before}: choose another --out")


def whole_numbers(text):
    """ "8,32" -> [8, 32]. Raises InputError for anything else."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise InputError(f"{text}: give whole numbers with commas between them")
    return [int(number) for number in text.split(",")]


def split_options(options_class, arguments):
    """The arguments that belong to a bench, and the rest, which it passes on to a stage."""
    known = {field.name for field in fields(options_class)} | {"h", "help"}
    own = [a for a in arguments if a.split("=")[0].lstrip("-").replace("-", "_") in known]
    return own, [a for a in arguments if a not in own]


def seconds_of(work):
    """How long work() takes, with what it queued on a GPU."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def time_in_turns(works, rounds):
    """Seconds of several functions (rounds, functions). Each round calls all of them, since the
    speed of a machine varies."""
    return np.array([[seconds_of(work) for work in works] for _ in range(rounds)])


def fastest(works):
    """The name of the fastest of several functions: name -> function. A function that runs out of
    GPU memory is passed over."""
    taken = {}
    for name, work in works.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            work()  # warms up
            taken[name] = seconds_of(work)
    return min(taken, key=taken.get)


def natural_mix(n, rng):
    """Lengths of n texts in tokens, log-normal as those of web texts: median 70, up to 2,048."""
    return np.exp(rng.normal(math.log(70), 1.0, n)).clip(8, 2048).astype(int)


def pieces_of_text(data, tokenizer, lengths, rng):
    """Pieces of a data folder's training text, with these lengths: a list of id arrays."""
    ids = Source(f"{data}/stage1/train", tokenizer).columns["document"].tokens
    starts = rng.integers(0, len(ids) - 2048, len(lengths))
    return [ids[i : i + n].astype(np.int64) for i, n in zip(starts, lengths, strict=True)]


def matrix_rate(config, dtype, device):
    """Operations per second of the matrix products of one layer, (N, C) x (C, 3C) and so on: the
    highest of two N. A GPU needs large matrices, a CPU is fastest while they fit in its cache."""
    C, inner, rates = config.hidden_size, config.intermediate_size, []
    shapes = [(C, 3 * C), (C, C), (C, inner), (C, inner), (inner, C)]
    new = {"dtype": dtype, "device": device}
    for N in (2048, 8192) if device.type == "cpu" else (8192, 65_536):
        pairs = [(torch.randn(N, a, **new), torch.randn(a, b, **new)) for a, b in shapes]
        operations, began = 0, time.perf_counter()
        while time.perf_counter() - began < 0.5:
            for x, weight in pairs:
                y = x @ weight
                operations += 2 * x.numel() * weight.shape[1]
            y[0, 0].item()  # waits for a GPU
        rates.append(operations / (time.perf_counter() - began))
    return max(rates)
