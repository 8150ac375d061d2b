"""Attention over packed texts: within each text, and as if the others were not there.

Three ways to compute the same thing. One is chosen when a run starts (`choose`, --attention):

    flash-attn   flash_attn_varlen_func of the package flash-attn     CUDA, half precision
    varlen       varlen_attn of torch itself, from 2.11 on            CUDA, half precision
    portable     PyTorch's attention, a call for each length          everywhere, any precision

The first two are kernels that read cu_seqlens themselves: one call for all texts. PyTorch's own
attention wants a rectangle, so for the portable way texts of equal length share a call. None of
them computes anything for padding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data.store import send
from options import InputError

WAYS = ("auto", "flash-attn", "varlen", "portable")


def choose(wanted, device, dtype):
    """The way to compute attention: the one wanted, or for "auto" the first that works here.

    Raises InputError for one that does not work here, saying why."""
    if wanted not in WAYS:
        raise InputError(f"--attention={wanted}: give {', '.join(WAYS)}")
    missing = dict.fromkeys(WAYS[1:], "")  # way -> why not
    for way in ("flash-attn", "varlen"):
        if device.type != "cuda":
            missing[way] = "it needs a CUDA GPU: leave it out, or give --attention=portable"
        elif dtype not in (torch.bfloat16, torch.float16):
            missing[way] = f"it computes in bf16, not in {dtype}: add --precision=bf16"
        elif kernel_of(way) is None:
            package = {"flash-attn": "pip install flash-attn", "varlen": "torch 2.11 has it"}
            missing[way] = f"it is not installed: {package[way]}"
    if wanted != "auto" and missing[wanted]:
        raise InputError(f"--attention={wanted}: {missing[wanted]}")
    return wanted if wanted != "auto" else next(way for way in missing if not missing[way])


@functools.cache
def kernel_of(way):
    """The function of flash-attn or torch that takes cu_seqlens; None where there is none. It is
    imported when a GPU wants it: that takes a second."""
    try:
        if way == "flash-attn":
            from flash_attn import flash_attn_varlen_func as kernel
        elif way == "varlen":
            from torch.nn.attention.varlen import varlen_attn as kernel
        else:
            return None
    except ImportError:
        return None
    return kernel


@dataclass
class Packing:
    """Where the texts of a packed batch are, as the chosen way wants to know it."""

    kernel: Callable | None  # None: the portable way
    cu_seqlens: torch.Tensor  # (B + 1,) int32, on the device
    longest: int  # tokens, or more: the kernels size their grid by it
    groups: list  # (length, number of texts) of each run of equal lengths; of the portable way only


def packing(cu_seqlens, way, device):
    """-> (order, Packing). order: how to permute the tokens so that texts of equal length come
    together, the longest first; None where they stand right already, as in our own micro-batches.

    cu_seqlens (B + 1,) int32 is best on the CPU, where its numbers are needed: to fetch them from a
    GPU is to wait until all that was asked of it is done."""
    host = cu_seqlens.cpu().numpy()
    lengths = np.diff(host)  # (B,)
    cu_seqlens = send(cu_seqlens, device)
    if way != "portable":
        # a power of two: few values, for each of which torch.compile may compile anew
        longest = 1 << max(6, int(lengths.max() - 1).bit_length())
        return None, Packing(kernel_of(way), cu_seqlens, longest, [])
    order = None
    if (np.diff(lengths) > 0).any():
        by_length = np.argsort(-lengths, kind="stable")
        parts = [np.arange(host[i], host[i + 1]) for i in by_length]
        order = send(np.concatenate(parts), device)  # (N,)
    values, counts = np.unique(-lengths, return_counts=True)
    groups = [(-int(value), int(count)) for value, count in zip(values, counts, strict=True)]
    return order, Packing(None, cu_seqlens, groups[0][0], groups)


def attention(q, k, v, packing):
    """softmax(Q K^T / sqrt(D)) V within each text: (N, H, D) each -> (N, H, D)."""
    if packing.kernel is None:
        return portable_attention(q, k, v, packing)
    texts, longest = packing.cu_seqlens, packing.longest
    # the texts of the queries are those of the keys
    return packing.kernel(q, k, v, texts, texts, longest, longest)


# ------------------------------------------------------------------------------------------------
# The portable way


def portable_attention(q, k, v, packing):
    """Attention of groups of texts of equal length, which stand together."""
    outputs = []
    sizes = [length * texts for length, texts in packing.groups]
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    for (length, texts), part in zip(packing.groups, parts, strict=True):
        # (texts * length, H, D) each -> (texts, H, length, D)
        rectangles = (x.view(texts, length, *x.shape[1:]).transpose(1, 2) for x in part)
        outputs.append(attend(*rectangles).transpose(1, 2).flatten(0, 1))  # (texts * length, H, D)
    return torch.cat(outputs)


SCORES = 1 << 22  # at a time: 8 MiB of bf16, which a CPU's cache holds


def attend(q, k, v):
    """softmax(Q K^T / sqrt(D)) V: (texts, H, length, D) each -> (texts, H, length, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attend_in_blocks(q, k, v):
    """The same, written out in matrix products, of a few heads or some rows of one at a time.

    For bf16 on a CPU, where PyTorch's fused kernel is slow: in a trial by hand, forward alone, this
    took less than half its time from 70 to 4,096 tokens; a training step took a third longer with
    the kernel, whose backward pass is slower still."""
    shape, length, D = q.shape, *q.shape[2:]
    q, k, v = (x.reshape(-1, length, D) for x in (q, k, v))  # (texts * H, length, D)
    heads, rows, outputs = max(1, SCORES // length**2), max(1, SCORES // length), []
    for q_, k_, v_ in zip(q.split(heads), k.split(heads), v.split(heads), strict=True):
        blocks = [(scaled_product(block, k_).softmax(-1) @ v_) for block in q_.split(rows, dim=1)]
        outputs.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1))
    return torch.cat(outputs).view(shape)


def scaled_product(q, k):
    """Q K^T / sqrt(D) in one pass over the scores: (heads, rows, D), (heads, length, D) ->
    (heads, rows, length)."""
    return torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5)
