"""Negatives from other processes: four ways to gather them, and what each does to the gradient.

    python bench/gradients.py                      # 2 and 4 processes: ten seconds

W processes share 64 pairs. Each computes its part of the loss, and the gradients are summed. The
true gradient is that of one process with all pairs. The table has the norm of the gradient over the
true norm, and the cosine of the two. Adam hides a wrong factor; clipping and the logged loss do
not. Nothing hides a wrong direction, and nothing reports it.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.functional import cosine_similarity, normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row, whole_numbers
from common.options import InputError, cli, read_options
from contrastive import gather, info_nce

WAYS = {
    "exact": "gathered with gradient, ours",
    "averaged": "the same, gradients averaged (DDP)",
    "without gradient": "gathered without gradient",
    "not gathered": "not gathered: local negatives only",
}


@dataclass
class Options:
    processes: str = "2,4"  # how many, with commas
    pairs: int = 64  # of the global batch


def work(rank, world, store, pairs, results, E=16):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    new = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    query, noise = torch.randn(pairs, E, **new), torch.randn(pairs, E, **new)
    start = torch.randn(E, E, **new) / E**0.5
    share = pairs // world
    own = slice(rank * share, (rank + 1) * share)
    for way in WAYS:
        weight = start.clone().requires_grad_()
        sides = (normalize(side, dim=-1)[own] for side in (query, query + noise))
        q, d = (normalize(side @ weight, dim=-1) for side in sides)
        documents, first = (d, 0) if way == "not gathered" else (gather(d), own.start)
        if way == "without gradient":  # except for the documents of this process
            documents = documents.detach().clone()
            documents[own] = d
        loss = info_nce(q, documents, 0.05, first) / pairs  # a part of the mean over all queries
        loss.backward()
        dist.all_reduce(weight.grad)
        if rank == 0:
            results[world, way] = weight.grad.flatten() / (world if way == "averaged" else 1)
    dist.destroy_process_group()


def measure(options):
    """(W, way) -> the gradient's norm over that of the true one, and its cosine with it."""
    results = multiprocessing.Manager().dict()
    for world in [1, *whole_numbers(options.processes, "processes")]:
        if options.pairs % world:
            raise InputError(f"--pairs={options.pairs} does not divide by {world} processes")
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, f"{folder}/store", options.pairs, results)
            multiprocessing.spawn(work, arguments, nprocs=world)
    results, true = dict(results), results[1, "exact"]
    sizes = {key: (gradient.norm() / true.norm()).item() for key, gradient in results.items()}
    return {key: (sizes[key], cosine_similarity(results[key], true, 0).item()) for key in results}


def main(arguments):
    options, _ = read_options(Options, arguments)
    found, worlds = measure(options), options.processes.split(",")
    print_head("size / cosine", *(f"W = {world}" for world in worlds))
    for way, title in WAYS.items():
        print_row(title, *("{:.3f} / {:.3f}".format(*found[int(W), way]) for W in worlds))


if __name__ == "__main__":
    cli(main)
