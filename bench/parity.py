"""How far our model is from transformers' own NomicBert: float32, random weights, one text.

    python bench/parity.py                                   # the published shape: some minutes

Numbers are the largest difference over the largest value; MLM logits are those of the first 256
positions. Beyond the trained length of 2,048 tokens both scale RoPE by Dynamic NTK with factor s.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row, published_shape
from common.options import cli, read_options
from data.store import pack
from model import NomicBertForMaskedLM

LENGTHS = {1: (2049, 8192), 2: (1, 77, 2048, 2049, 8192), 4: (2049, 8192)}  # s -> tokens of a text


@dataclass
class Options:
    layers: int = 12  # of the model
    hidden_size: int = 768  # of the model, in heads of 64 features


def theirs(cls, directory):
    """Their model from our directory: all weights are found, none is left over."""
    model, loading = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def deviation(ours, theirs):
    """The largest difference, over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def deviations(model, other, length):
    """Of hidden states, of pooled embeddings and of MLM logits, for one text of random tokens."""
    ids = np.random.default_rng(length).integers(5, model.config.vocab_size, length)
    tokens, cu_seqlens = pack([ids])
    other.nomic_bert(torch.ones(1, 1, dtype=torch.long))  # it keeps the angles of the longest text
    hidden, expected = model.bert(tokens, cu_seqlens), other.nomic_bert(tokens[None])[0][0]
    mean = torch.nn.functional.normalize(expected.mean(0, keepdim=True))
    return (
        deviation(hidden, expected),
        deviation(model.bert.pool(hidden, cu_seqlens), mean),
        deviation(model.cls["predictions"](hidden[:256]), other.cls(expected[:256])),
    )


def main(arguments):
    options, _ = read_options(Options, arguments)
    from transformers import AutoModelForMaskedLM

    print_head("s", "tokens", "hidden states", "embedding", "MLM logits")
    for s, lengths in LENGTHS.items():
        torch.manual_seed(0)
        shape = published_shape(options.layers, options.hidden_size, rope_factor=float(s))
        model = NomicBertForMaskedLM(shape)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            other = theirs(AutoModelForMaskedLM, folder)
        for length in lengths:
            print_row(s, f"{length:,}", *(f"{x:.1e}" for x in deviations(model, other, length)))


if __name__ == "__main__":
    cli(main)
