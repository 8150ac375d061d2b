"""Peak memory of a contrastive step as the batch grows, with and without GradCache.

    python bench/memory.py                         # the laptop model, 1,024 to 16,384 pairs
    python bench/memory.py --batches=256,512       # quick
    python bench/memory.py --preset=paper --batches=1024,4096,16384,65536 --longest=1024    # a GPU

With GradCache the activations of one micro-batch are in memory at a time. What grows with the batch
is its embeddings with their gradients, 16 C bytes a pair, and the token ids; scores stop at 2 ** 23
at a time (info_nce), 32 MiB, of which cross-entropy and its gradient make a few copies. Without
GradCache the activations of the whole batch are kept.

Each line is a process of its own: the peak of its memory (of a GPU, where there is one) less what
it had before. On a CPU it is told to give back what it frees (glibc would keep much of it, in
pieces too small to use again).
"""

import multiprocessing
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import model_shape
from contrastive import PRESETS, embed, grad_cache, info_nce
from contrastive import Config as Stage
from data import store
from model import NomicBert, fast_dtype
from options import read_options, run
from processes import best_device


@dataclass
class Options:
    preset: str = "laptop"  # whose model, and whose lengths
    data: str = "out/pydocs"  # a data folder
    source: str = "name-docstring"  # of its stage 2, the one that pairs come from
    batches: str = "1024,2048,4096,8192,16384"  # pairs
    micro_batch_tokens: int = 0  # the same for all batches; 0 is what the preset has
    longest: int = 4096  # pairs that are tried without GradCache


def peak():
    """The most memory that this process ever had, in MiB. (macOS counts bytes, Linux KiB.)"""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / (1 << 20)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def step(pairs, cached, options, result):
    """Forward and backward of one batch; puts (tokens, MiB, hidden size) into result."""
    shape, _ = read_options(Stage, [f"--preset={options.preset}"], PRESETS)
    tokenizer = store.load_tokenizer(options.data)
    model = NomicBert(model_shape(shape, tokenizer.get_vocab_size(), shape.trained_length))
    model.to(best_device())
    model.dtype = fast_dtype(model.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # is there at any batch size
    source = store.Source(f"{options.data}/stage2/{options.source}", tokenizer)
    rows = np.arange(pairs) % len(source)  # a source may be smaller than a batch
    texts = source.texts("query", rows, shape.query_tokens)
    texts += source.texts("document", rows, shape.document_tokens)
    budget = options.micro_batch_tokens or shape.micro_batch_tokens

    def loss_of(embeddings):
        return info_nce(*embeddings.chunk(2), shape.temperature) / pairs

    before = peak()
    if cached:
        grad_cache(model, texts, loss_of, budget)
    else:
        loss_of(embed(model, texts, budget)).backward()
    result.put((sum(map(len, texts)), peak() - before, model.config.hidden_size))


def main(arguments):
    options, _ = read_options(Options, arguments)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # bytes; for the processes started below
    context = multiprocessing.get_context("spawn")
    print(f"{'pairs':>8}{'tokens':>10}{'GradCache':>12}{'of it embeddings':>18}{'without':>12}")
    for pairs in map(int, options.batches.split(",")):
        cells = []
        for cached in (True, False)[: 1 + (pairs <= options.longest)]:
            result = context.Queue()
            process = context.Process(target=step, args=(pairs, cached, options, result))
            process.start()
            tokens, memory, size = result.get()
            process.join()
            cells.append(f"{memory:8,.0f} MiB")
            if cached:
                cells.append(f"{pairs * 2 * 2 * size * 4 / (1 << 20):14,.0f} MiB")
        print(f"{pairs:8,}{tokens:10,}" + "".join(cells), flush=True)


if __name__ == "__main__":
    run(main)
