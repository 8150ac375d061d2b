"""Attention over packed texts: within each text, and as if the others were not there.

A packed batch has texts of many lengths. PyTorch's own attention wants a rectangle, so texts of
equal length share a call, and nothing is computed for padding. This is the portable path, for every
machine; a GPU with kernels that take cu_seqlens itself needs no grouping, and such paths belong
behind the same function.
"""

import numpy as np
import torch
import torch.nn.functional as F


def length_groups(cu_seqlens):
    """Brings texts of equal length together.

    -> (order, groups). groups: a (length, number of texts) for each run, the longest first. order:
    how to permute the tokens to get there, or None where they stand so already, as they do in our
    own micro-batches."""
    lengths = cu_seqlens.diff().cpu().numpy()  # (B,)
    order = None
    if (np.diff(lengths) > 0).any():
        starts, by_length = cu_seqlens[:-1].cpu().numpy(), np.argsort(-lengths, kind="stable")
        parts = [np.arange(starts[i], starts[i] + lengths[i]) for i in by_length]
        order = torch.from_numpy(np.concatenate(parts)).to(cu_seqlens.device)  # (N,)
    values, counts = np.unique(-lengths, return_counts=True)
    return order, [(-int(value), int(count)) for value, count in zip(values, counts, strict=True)]


def attention(q, k, v, groups):
    """Attention within each text: (N, H, D) each -> (N, H, D).

    groups: from length_groups, in whose order the tokens stand."""
    outputs = []
    sizes = [length * texts for length, texts in groups]
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    for (length, texts), part in zip(groups, parts, strict=True):
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
