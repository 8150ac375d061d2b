"""Peak memory of a contrastive step as the batch grows, with and without GradCache.

    python bench/memory.py                         # the laptop model: some minutes
    python bench/memory.py --preset=paper --batches=1024,4096,16384,65536 --longest=1024    # a GPU

With GradCache the activations of one micro-batch are in memory at a time. What grows with the batch
are the token ids, and the embeddings and their gradients: 16 C bytes a pair. Each number is the
peak of a process of its own, on a GPU where there is one, less what it had before the step.
"""

import os
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import natural_mix, print_head, print_machine, print_row, whole_numbers
from common.device import best_device, fast_dtype
from common.options import cli, read_options
from contrastive import PRESETS, Config, embed, grad_cache, info_nce_in_blocks
from model import ModelConfig, NomicBert

# glibc gives freed memory back at once, and a CPU's kernels are not kept for every shape: such
# caches grow for some hundred micro-batches, and not beyond
CACHES = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}
CACHES |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "8"}


@dataclass
class Options:
    preset: str = "laptop"  # whose model, lengths of texts, and micro-batches
    batches: str = "1024,4096,16384"  # pairs
    longest: int = 4096  # the largest batch that is tried without GradCache [0, 1e9]


def peak_memory():
    """The most memory that this process ever had, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def step(pairs, cached, config):
    """Forward and backward of one batch of random tokens. Returns how many, and MiB."""
    shape = ModelConfig.from_options(config, ModelConfig.vocab_size, config.trained_length)
    model, rng = NomicBert(shape).to(best_device()), np.random.default_rng(0)
    model.dtype = fast_dtype(model.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # in memory at any batch size
    documents = natural_mix(pairs, rng).clip(max=config.document_tokens)
    texts = [rng.integers(5, 20_000, n) for n in (*rng.integers(6, 21, pairs), *documents)]

    def loss_of(embeddings):
        return info_nce_in_blocks(*embeddings.chunk(2), config.temperature) / pairs

    before = peak_memory()
    if cached:
        grad_cache(model, texts, loss_of, config.micro_batch_tokens)
    else:
        loss_of(embed(model, texts, config.micro_batch_tokens)).backward()
    return sum(map(len, texts)), peak_memory() - before


def measure(*arguments):
    """step() in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(step, *arguments).result()


def main(arguments):
    options, _ = read_options(Options, arguments)
    config, _ = read_options(Config, [f"--preset={options.preset}"], PRESETS)
    os.environ |= CACHES
    print_machine(f"preset {options.preset}")
    print_head("pairs", "tokens", "with GradCache, MiB", "without, MiB")
    for pairs in whole_numbers(options.batches):
        tokens, cached = measure(pairs, True, config)
        plain = f"{measure(pairs, False, config)[1]:,.0f}" if pairs <= options.longest else ""
        print_row(f"{pairs:,}", f"{tokens:,}", f"{cached:,.0f}", plain)


if __name__ == "__main__":
    cli(main)
