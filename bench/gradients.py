"""Negatives from other processes: four ways to gather them, and what becomes of the gradient.

    python bench/gradients.py

W processes share 64 pairs; each computes its part of the loss, and the parts of the gradient are
added up. The true gradient is that of one process with all pairs. A factor of W (a mean where a sum
belongs, or the reverse) is hidden by Adam, but neither by clipping nor by the logged loss; a wrong
direction is hidden by nothing, and complains as little.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from contrastive import gather, info_nce
from options import read_options, run

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
    seed: int = 0  # of queries, documents and weights


def batch(pairs, seed, E=16):
    """Queries and documents at unit length, each near the other; and a matrix of weights."""
    generator = torch.Generator().manual_seed(seed)
    query, noise = (
        torch.randn(pairs, E, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    weight = torch.randn(E, E, generator=generator, dtype=torch.float64) / E**0.5
    return F.normalize(query, dim=-1), F.normalize(query + noise, dim=-1), weight


def loss_of(query, document, way, pairs, first):
    """This process's part of the mean over the global batch, or what passes for it."""
    mine = slice(first, first + len(query))
    if way == "not gathered":
        return info_nce(query, document, 0.05) / pairs
    if way == "without gradient":
        everyone = gather(document.detach())
        everyone = torch.cat([everyone[: mine.start], document, everyone[mine.stop :]])
        return info_nce(query, everyone, 0.05, first) / pairs
    return info_nce(query, gather(document), 0.05, first) / pairs


def work(rank, world, port, options, results):
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", address, rank=rank, world_size=world)
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
    """(W, way) -> (size, cosine) of the gradient, over and with the true one."""
    results = multiprocessing.Manager().dict()
    work(0, 1, None, options, results)
    true, found = results[1, "exact"], {}
    for world in map(int, options.processes.split(",")):
        port = 20_000 + int(np.random.default_rng().integers(20_000))
        multiprocessing.spawn(work, (world, port, options, results), nprocs=world)
        for way in WAYS.values():
            gradient = results[world, way]
            size = (gradient.norm() / true.norm()).item()
            found[world, way] = (size, F.cosine_similarity(gradient, true, dim=0).item())
    return found


def main(arguments):
    options, _ = read_options(Options, arguments)
    worlds = [int(world) for world in options.processes.split(",")]
    found = measure(options)
    print(f"{'size / cosine':36}" + "".join(f"{f'W = {world}':>16}" for world in worlds))
    for title, way in WAYS.items():
        cells = ("{:.3f} / {:.3f}".format(*found[world, way]) for world in worlds)
        print(f"{title:36}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    run(main)
