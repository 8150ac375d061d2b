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


def work(rank, world, store, pairs, results, E=16):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    new = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    query, noise = torch.randn(pairs, E, **new), torch.randn(pairs, E, **new)
    start = torch.randn(E, E, **new) / E**0.5
    share = pairs // world
    first = rank * share
    for way in WAYS.values():
        weight = start.clone().requires_grad_()
        sides = (F.normalize(side, dim=-1) for side in (query, query + noise))  # near each other
        q, d = (F.normalize(x[first : first + share] @ weight, dim=-1) for x in sides)
        everyone = d if way == "not gathered" else gather(d)
        if way == "without gradient":  # but for the documents of this process
            everyone = everyone.detach().clone()
            everyone[first : first + share] = d
        loss = info_nce(q, everyone, 0.05, 0 if way == "not gathered" else first) / pairs
        loss.backward()  # this process's part of the mean over the global batch
        dist.all_reduce(weight.grad)
        if way == "averaged":
            weight.grad /= world
        if rank == 0:
            results[world, way] = weight.grad.flatten()
    dist.destroy_process_group()


def measure(options):
    """(W, way) -> the gradient's size over that of the true one, and its cosine with it."""
    results, found = multiprocessing.Manager().dict(), {}
    for world in map(int, f"1,{options.processes}".split(",")):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, f"{folder}/store", options.pairs, results)
            multiprocessing.spawn(work, arguments, nprocs=world)
    true = results[1, "exact"]
    for (world, way), gradient in results.items():
        size = (gradient.norm() / true.norm()).item()
        found[world, way] = (size, F.cosine_similarity(gradient, true, dim=0).item())
    return found


def main(arguments):
    options, _ = read_options(Options, arguments)
    found, worlds = measure(options), options.processes.split(",")
    print_head("size / cosine", *(f"W = {world}" for world in worlds))
    for title, way in WAYS.items():
        print_row(title, *("{:.3f} / {:.3f}".format(*found[int(W), way]) for W in worlds))


if __name__ == "__main__":
    cli(main)
