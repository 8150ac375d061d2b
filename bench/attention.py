"""How fast are the ways to compute attention within each text of a batch?

    python bench/attention.py                     # a minute or two on a CPU
    python bench/attention.py --tokens=65536      # for a GPU

Times forward and backward over one batch. The usual way, a padded batch with a mask, is measured
too. That all of ours agree with softmax written out in float64 is a test (tests/test_model.py).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import natural_mix, print_head, print_machine, print_row, time_in_turns
from common.device import best_device, fast_dtype
from common.options import cli, read_options
from model import find_segments, packed_attention, varlen_kernel


@dataclass
class Options:
    tokens: int = 8192  # of the batch [16, 1e9]
    heads: int = 12  # H, of 64 features each
    rounds: int = 5  # how often each is timed; the median counts


def padded_attention(q, k, v, lengths):
    """(N, H, D) each -> rectangles (B, H, longest, D) and a mask -> (N, H, D)."""
    padded = (pad_sequence(x.split(lengths), True).transpose(1, 2) for x in (q, k, v))
    ends = torch.tensor(lengths, device=q.device)[:, None]
    mask = torch.arange(max(lengths), device=q.device) < ends  # (B, longest)
    out = scaled_dot_product_attention(*padded, attn_mask=mask[:, None, None])
    return out.transpose(1, 2)[mask]


def forward_backward(attend, x, weights):
    """x (N, 3, H, D): q, k and v; weights (N, H, D): the gradient of the result."""
    torch.autograd.grad(attend(*x.unbind(1)), x, weights)


def main(arguments):
    options, _ = read_options(Options, arguments)
    device = best_device()
    dtype = fast_dtype(device)
    mix = natural_mix(options.tokens, np.random.default_rng(0))
    mix = mix[: max(1, np.searchsorted(np.cumsum(mix), options.tokens))]
    kernels = {"texts grouped by length": None}
    if best := varlen_kernel(device.type, dtype):
        from torch.nn.attention.varlen import varlen_attn

        kernels |= {kernel.__name__: kernel for kernel in (varlen_attn, best)}
    sets = {"natural mix": sorted(mix.tolist(), reverse=True)}
    sets["2,048 tokens"] = [2048] * max(1, options.tokens // 2048)
    print_machine(dtype)
    print_head("texts", "", "ms", "tokens/s")
    for title, lengths in sets.items():
        new = {"dtype": dtype, "device": device}
        x = torch.randn(sum(lengths), 3, options.heads, 64, **new, requires_grad=True)
        weights = torch.randn(sum(lengths), options.heads, 64, **new)
        ways = {"padded, with a mask": partial(padded_attention, lengths=lengths)}
        cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        for name, kernel in kernels.items():
            segments = find_segments(cu_seqlens, kernel, device)
            ways[name] = partial(packed_attention, segments=segments)
        for name, attend in ways.items():
            work = partial(forward_backward, attend, x, weights)
            work()  # warms up
            seconds = np.median(time_in_turns([work], options.rounds))
            speed = f"{seconds * 1e3:.1f}", f"{sum(lengths) / seconds:,.0f}"
            print_row(f"{title}: {len(lengths):,}", name, *speed)


if __name__ == "__main__":
    cli(main)
