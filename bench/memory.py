"""Peak memory of a contrastive step as the batch grows, with and without GradCache.

    python bench/memory.py                         # the laptop model, up to 16,384 pairs: minutes
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
from bench.shared import print_head, print_machine, print_row
from common.device import best_device, fast_dtype
from common.files import load_tokenizer
from common.options import cli, read_options
from contrastive import PRESETS, Config, embed, grad_cache, info_nce_in_blocks
from data.store import Source
from model import ModelConfig, NomicBert


@dataclass
class Options:
    preset: str = "laptop"  # whose model, and whose lengths
    data: str = "out/pydocs"  # a data folder
    source: str = "name-docstring"  # of its stage 2, the one that pairs come from
    batches: str = "1024,2048,4096,8192,16384"  # pairs
    micro_batch_tokens: int = 0  # the same for all batches; 0: that of the preset [0, 1e9]
    longest: int = 4096  # the largest batch that is tried without GradCache [0, 1e9]


def peak_memory():
    """The most memory that this process ever had, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def step(pairs, cached, options):
    """Forward and backward of one batch. Returns its tokens, and MiB: all, and of embeddings."""
    config, _ = read_options(Config, [f"--preset={options.preset}"], PRESETS)
    tokenizer, length = load_tokenizer(options.data), config.trained_length
    shape = ModelConfig.from_options(config, tokenizer.get_vocab_size(), length)
    model = NomicBert(shape).to(best_device())
    model.dtype = fast_dtype(model.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # in memory at any batch size
    source = Source(f"{options.data}/stage2/{options.source}", tokenizer)
    rows = np.arange(pairs) % len(source)  # a source may be smaller than a batch
    texts = source.texts("query", rows, config.query_tokens)
    texts += source.texts("document", rows, config.document_tokens)
    budget = options.micro_batch_tokens or config.micro_batch_tokens

    def loss_of(embeddings):
        return info_nce_in_blocks(*embeddings.chunk(2), config.temperature) / pairs

    before = peak_memory()
    if cached:
        grad_cache(model, texts, loss_of, budget)
    else:
        loss_of(embed(model, texts, budget)).backward()
    return sum(map(len, texts)), peak_memory() - before, 16 * pairs * config.hidden_size / 2**20


def measure(pairs, cached, options):
    """step() in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(step, pairs, cached, options).result()


def main(arguments):
    options, _ = read_options(Options, arguments)
    # freed memory goes back to the system at once, instead of staying with glibc in pieces
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    print_machine(best_device(), f"preset {options.preset}")
    print_head("pairs", "tokens", "GradCache, MiB", "of it embeddings, MiB", "without, MiB")
    for pairs in map(int, options.batches.split(",")):
        tokens, cached, embeddings = measure(pairs, True, options)
        plain = f"{measure(pairs, False, options)[1]:,.0f}" if pairs <= options.longest else ""
        print_row(f"{pairs:,}", f"{tokens:,}", f"{cached:,.0f}", f"{embeddings:,.0f}", plain)


if __name__ == "__main__":
    cli(main)
