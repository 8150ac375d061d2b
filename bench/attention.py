"""The ways to compute attention: do they agree with softmax in float64, and how fast are they?

    python bench/attention.py                     # in a minute on a CPU
    python bench/attention.py --tokens=65536      # for a GPU

Forward and backward over one batch of texts, of a natural mix of lengths (log-normal, median 70, up
to 2,048) and all of 2,048 tokens. Beside our ways stands what most code does: the batch padded to a
rectangle, with a mask, through F.scaled_dot_product_attention. Deviation is the largest difference
from the result, and from the gradient, in float64, over the largest value; for the first texts.
"""

import math
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attention import WAYS, attention, choose, packing
from options import InputError, read_options, run
from processes import best_device, fast_dtype


@dataclass
class Options:
    tokens: int = 8192  # of the batch
    heads: int = 12  # H
    head_size: int = 64  # D
    rounds: int = 5  # how often each is timed; the median counts
    seed: int = 0  # of lengths and vectors


def written_out(q, k, v):
    """softmax(Q K^T / sqrt(D)) V of one text, in float64: (L, H, D) each -> (L, H, D)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def padded_attention(q, k, v, lengths):
    """As most code does: (N, H, D) to a rectangle (B, H, longest, D), with a mask of the texts."""
    texts = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), True) for x in (q, k, v)]
    ends = torch.tensor(lengths, device=q.device)[:, None]
    there = torch.arange(max(lengths), device=q.device) < ends  # (B, longest)
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in texts), attn_mask=there[:, None, None]
    )
    return out.transpose(1, 2)[there]  # (N, H, D)


def lengths_of(options):
    """name -> lengths, the longest first, of about as many tokens as were asked for."""
    rng = np.random.default_rng(options.seed)
    mix = np.exp(rng.normal(math.log(70), 1.0, options.tokens)).clip(8, 2048).astype(int)
    mix = mix[: np.searchsorted(np.cumsum(mix), options.tokens)]
    return {
        "natural mix": sorted(mix.tolist(), reverse=True),
        "2,048 tokens": [2048] * max(1, options.tokens // 2048),
    }


def measure(attend, qkv, weights, rounds, device):
    """Median seconds forward and backward; the result (N, H, D); the gradient (N, 3, H, D)."""
    seconds = []
    for _ in range(rounds + 2):
        x = qkv.detach().requires_grad_()
        began = time.perf_counter()
        out = attend(*x.unbind(1))
        (out * weights).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:]), out.detach(), x.grad


def reference(qkv, weights, lengths, tokens=4096):
    """Result and gradient in float64, for the shortest texts of so many tokens."""
    few = max(1, int(np.searchsorted(np.cumsum(lengths[::-1]), tokens)))
    N = sum(lengths[-few:])
    x = qkv[-N:].double().requires_grad_()
    out = torch.cat([written_out(*part.unbind(1)) for part in x.split(lengths[-few:])])
    (out * weights[-N:].double()).sum().backward()
    return N, out.detach(), x.grad


def deviation(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def main(arguments):
    options, _ = read_options(Options, arguments)
    device = best_device()
    dtype = fast_dtype(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}, {dtype}")
    for title, lengths in lengths_of(options).items():
        torch.manual_seed(options.seed)
        N, shape = sum(lengths), (options.heads, options.head_size)
        qkv = torch.randn(N, 3, *shape).to(device, dtype)
        weights = torch.randn(N, *shape).to(device, dtype)
        few, expected, gradient = reference(qkv, weights, lengths)
        cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        print(f"\n{title}: {len(lengths):,} texts, {N:,} tokens")
        print(f"{'':14}{'ms':>10}{'tokens/s':>14}{'deviation':>12}{'of gradient':>13}")
        for way in (*WAYS[1:], "padded"):
            try:
                attend = partial(padded_attention, lengths=lengths)
                if way != "padded":
                    _, packed = packing(cu_seqlens, choose(way, device, dtype), device)
                    attend = partial(attention, packing=packed)
            except InputError as error:
                reason = str(error).split(": ", 1)[1]
                print(f"{way:14}  not here: {reason}")
                continue
            seconds, out, grad = measure(attend, qkv, weights, options.rounds, device)
            of_result, of_gradient = (
                deviation(out[-few:], expected),
                deviation(grad[-few:], gradient),
            )
            speed = f"{seconds * 1e3:10.1f}{N / seconds:14,.0f}"
            print(f"{way:14}{speed}{of_result:12.1e}{of_gradient:13.1e}", flush=True)


if __name__ == "__main__":
    run(main)
