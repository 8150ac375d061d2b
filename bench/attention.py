"""The ways to compute attention: do they agree with softmax in float64, and how fast are they?

    python bench/attention.py                     # a minute on a CPU
    python bench/attention.py --tokens=65536      # for a GPU

Forward and backward over one batch. Next to our ways stands what most code does: a batch padded to
a rectangle, with a mask. Deviation is the largest difference from result and gradient in float64,
over the largest value, for the shortest texts.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.parity import deviation
from bench.shared import natural_mix, print_head, print_machine, print_row, seconds_of
from common.device import best_device, fast_dtype
from common.options import cli, read_options
from model import find_segments, packed_attention, varlen_kernel


@dataclass
class Options:
    tokens: int = 8192  # of the batch [16, 1e9]
    heads: int = 12  # H, of 64 numbers each
    rounds: int = 5  # how often each is timed; the median counts


def written_out(q, k, v):
    """softmax(Q K^T / sqrt(D)) V of one text: (L, H, D) each -> (L, H, D)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def padded_attention(q, k, v, lengths):
    """(N, H, D) each -> rectangles (B, H, longest, D) and a mask -> (N, H, D)."""
    texts = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), True) for x in (q, k, v)]
    ends = torch.tensor(lengths, device=q.device)[:, None]
    mask = torch.arange(max(lengths), device=q.device) < ends  # (B, longest)
    rectangles = (x.transpose(1, 2) for x in texts)
    out = F.scaled_dot_product_attention(*rectangles, attn_mask=mask[:, None, None])
    return out.transpose(1, 2)[mask]


def ways(lengths, dtype, device):
    """name -> attention of q, k, v (N, H, D) each."""
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    kernels = {"texts grouped by length": None}
    if best := varlen_kernel(device.type, dtype):
        from torch.nn.attention.varlen import varlen_attn

        kernels |= {kernel.__name__: kernel for kernel in (varlen_attn, best)}
    found = {"padded, with a mask": lambda q, k, v: padded_attention(q, k, v, lengths)}
    for name, kernel in kernels.items():
        segments = find_segments(cu_seqlens, kernel, device)
        found[name] = lambda q, k, v, s=segments: packed_attention(q, k, v, s)
    return found


def main(arguments):
    options, _ = read_options(Options, arguments)
    device, rng = best_device(), np.random.default_rng(0)
    dtype = fast_dtype(device)
    torch.manual_seed(0)
    mix = natural_mix(options.tokens, rng)
    mix = sorted(mix[: max(1, np.searchsorted(np.cumsum(mix), options.tokens))].tolist())
    print_machine(device, dtype)
    print_head("texts", "", "ms", "tokens/s", "deviation", "of the gradient")
    equal = [2048] * max(1, options.tokens // 2048)
    for title, lengths in {"natural mix": mix[::-1], "2,048 tokens": equal}.items():
        N, shape = sum(lengths), (options.heads, 64)
        x = torch.randn(N, 3, *shape).to(device, dtype).requires_grad_()
        weights = torch.randn(N, *shape).to(device, dtype)
        few = lengths[-max(1, int(np.searchsorted(np.cumsum(lengths[::-1]), 4096))) :]
        n = sum(few)  # tokens, in float64
        exact = x[-n:].detach().double().requires_grad_()
        expected = torch.cat([written_out(*part.unbind(1)) for part in exact.split(few)])
        (expected * weights[-n:].double()).sum().backward()
        for name, attend in ways(lengths, dtype, device).items():

            def step(x=x, weights=weights, attend=attend):
                x.grad = None
                out = attend(*x.unbind(1))
                (out * weights).sum().backward()
                return out.detach(), x.grad

            step()  # warm
            out, gradient = step()
            seconds = statistics.median(seconds_of(step) for _ in range(options.rounds))
            pairs = (out, expected), (gradient, exact.grad)
            off = (f"{deviation(ours[-n:].double(), right):.1e}" for ours, right in pairs)
            speed = f"{seconds * 1e3:.1f}", f"{N / seconds:,.0f}"
            print_row(f"{title}: {len(lengths):,}", name, *speed, *off)


if __name__ == "__main__":
    cli(main)
