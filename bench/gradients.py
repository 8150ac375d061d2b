"""Negatives from other processes: four ways to gather them, and what becomes of the gradient.

    python bench/gradients.py                      # 2 and 4 processes: ten seconds

W processes share 64 pairs. Each computes its part of the loss, and the gradients are added up. The
true gradient is that of one process with all pairs. Adam hides a wrong factor, such as a mean in
place of a sum; clipping and the logged loss do not. Nothing hides a wrong direction, and nothing
reports it. The table has the size of the gradient over that of the true one, and their cosine.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row
from common.options import cli, read_options
from contrastive import gather, info_nce

WAYS = {
    "gathered with gradient, ours": "exact",
    "the same, gradients averaged (DDP)": "averaged",
    "gathered without gradient": "without gradient",
    "not gathered: local negatives only": "not gathered",
}


@dataclass
class Options:
    processes: str = "2,4"  # how many, with commas
    pairs: int = 64  # of the global batch
    seed: int = 0  # of queries, documents and weights [0, 1e18]


def batch(pairs, seed, E=16):
    """Queries and documents at unit length, each near the other; and a matrix of weights."""
    new = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    query, noise = torch.randn(pairs, E, **new), torch.randn(pairs, E, **new)
    weight = torch.randn(E, E, **new) / E**0.5
    return F.normalize(query, dim=-1), F.normalize(query + noise, dim=-1), weight


def loss_of(query, document, way, pairs, first):
    """This process's part of the mean over the global batch, or what stands in for it."""
    if way == "not gathered":
        return info_nce(query, document, 0.05) / pairs
    everyone = gather(document)
    if way == "without gradient":  # but for the documents of this process
        everyone = everyone.detach().clone()
        everyone[first : first + len(query)] = document
    return info_nce(query, everyone, 0.05, first) / pairs


def work(rank, world, store, options, results):
    if world > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    query, document, start = batch(options.pairs, options.seed)
    share = options.pairs // world
    mine = slice(rank * share, (rank + 1) * share)
    for way in WAYS.values():
        weight = start.clone().requires_grad_()
        q, d = (F.normalize(x[mine] @ weight, dim=-1) for x in (query, document))
        loss_of(q, d, way, options.pairs, rank * share).backward()
        if world > 1:
            dist.all_reduce(weight.grad)
        if way == "averaged":
            weight.grad /= world
        if rank == 0:
            results[world, way] = weight.grad.flatten()
    if world > 1:
        dist.destroy_process_group()


def measure(options):
    """(W, way) -> the gradient's size over that of the true one, and its cosine with it."""
    results, found = multiprocessing.Manager().dict(), {}
    work(0, 1, None, options, results)
    true = results[1, "exact"]
    for world in map(int, options.processes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, f"{folder}/store", options, results)
            multiprocessing.spawn(work, arguments, nprocs=world)
        for way in WAYS.values():
            gradient = results[world, way]
            size = (gradient.norm() / true.norm()).item()
            found[world, way] = (size, F.cosine_similarity(gradient, true, dim=0).item())
    return found


def main(arguments):
    options, _ = read_options(Options, arguments)
    found, worlds = measure(options), [int(world) for world in options.processes.split(",")]
    print_head("size / cosine", *(f"W = {world}" for world in worlds))
    for title, way in WAYS.items():
        print_row(title, *("{:.3f} / {:.3f}".format(*found[world, way]) for world in worlds))


if __name__ == "__main__":
    cli(main)
