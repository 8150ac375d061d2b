"""How far our model is from transformers' own NomicBert: float32, random weights, one text at once.

    python bench/parity.py                             # the published shape, some minutes
    python bench/parity.py --layers=2 --hidden-size=64 # in seconds

Numbers are the largest difference relative to the largest value, for hidden states, for pooled
embeddings and for the scores of the MLM head (at the first 256 places). Beyond the trained length
of 2,048 tokens both scale by Dynamic NTK, with s of 1, 2 and 4.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.store import pack
from model import Config, NomicBertForMaskedLM
from options import read_options, run


@dataclass
class Options:
    layers: int = 12  # of the model; 12 is the published one
    hidden_size: int = 768  # of the model; 768 is the published one
    longest: int = 8192  # tokens of the longest text


def theirs(cls, directory):
    """Their model of our directory: all weights found, none left over."""
    model, loading = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def deviation(ours, theirs):
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def deviations(model, other, length):
    """Of hidden states, of pooled embeddings and of MLM scores, for one text of random tokens."""
    ids = torch.from_numpy(
        np.random.default_rng(length).integers(5, model.config.vocab_size, length)
    )
    tokens, cu_seqlens = pack([ids.numpy()])
    with torch.no_grad():
        other.nomic_bert(torch.ones(1, 1, dtype=torch.long))  # they remember the longest text
        hidden, expected = model.bert(tokens, cu_seqlens), other.nomic_bert(ids[None])[0][0]
        mean = torch.nn.functional.normalize(expected.mean(0, keepdim=True))
        some = slice(0, 256)
        scores = model.cls["predictions"](hidden[some]), other.cls(expected[some])
        return (
            deviation(hidden, expected),
            deviation(model.bert.embed(tokens, cu_seqlens), mean),
            deviation(*scores),
        )


def main(arguments):
    from transformers import AutoModelForMaskedLM

    options, _ = read_options(Options, arguments)
    size = options.hidden_size
    print(f"{'s':>3}{'tokens':>8}{'hidden states':>16}{'embedding':>12}{'MLM scores':>12}")
    for s, lengths in {
        2.0: (1, 2, 77, 512, 2048, 2049, 4096, 8192),
        1.0: (2049, 4096, 8192),
        4.0: (2049, 4096, 8192),
    }.items():
        torch.manual_seed(0)
        config = Config(
            hidden_size=size,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, size // 64),
            intermediate_size=4 * size,
            rope_factor=s,
        )
        model = NomicBertForMaskedLM(config)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            other = theirs(AutoModelForMaskedLM, folder)
        for length in (length for length in lengths if length <= options.longest):
            found = deviations(model, other, length)
            cells = "".join(f"{x:{w}.1e}" for x, w in zip(found, (16, 12, 12), strict=True))
            print(f"{s:3.0f}{length:8,}{cells}", flush=True)


if __name__ == "__main__":
    run(main)
