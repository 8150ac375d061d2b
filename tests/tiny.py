"""Small things to test with: made here, in a moment, the same at every call."""

import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import Config, NomicBert


def tiny_model(tokenizer=None, cls=NomicBert, **shape):
    """A model with random weights that computes in float32; trained length 128."""
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size() if tokenizer else 320
    values = {
        "vocab_size": -(-size // 64) * 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    values |= {"intermediate_size": 128, "trained_length": 128, **shape}
    model = cls(Config(**values))
    for parameter in model.parameters():  # larger than at the start of training: a sharper test
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    (model if cls is NomicBert else model.bert).tokenizer = tokenizer
    return model


def softmax_attention(q, k, v):
    """softmax(Q K^T / sqrt(D)) V for one text: (L, H, D) each -> (L, H, D)."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1])
        out[:, head] = scores.softmax(-1) @ v[:, head]
    return out


def unit_rows(n, E=8, seed=0):
    """Random embeddings (n, E) at unit length."""
    rows = np.random.default_rng(seed).normal(size=(n, E)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class LargestTensor(TorchDispatchMode):
    """Within it, the number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result
