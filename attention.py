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


def attention(qkv, groups):
    """Attention within each text: (N, 3, H, D) -> (N, H, D).

    groups: from length_groups, in whose order the tokens stand."""
    outputs = []
    parts = qkv.split([length * texts for length, texts in groups])
    for (length, texts), part in zip(groups, parts, strict=True):
        part = part.view(texts, length, *part.shape[1:])  # (texts, length, 3, H, D)
        q, k, v = part.permute(2, 0, 3, 1, 4)  # (texts, H, length, D) each
        outputs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))  # (texts * length, H, D)
    return torch.cat(outputs)


def attend(q, k, v):
    """softmax(Q K^T / sqrt(D)) V: (texts, H, length, D) each -> (texts, H, length, D)."""
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # the fused kernel's backward pass is slow in this case: a step takes a third longer with it
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (texts, H, length, length)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
