"""Do copies of the right document hurt, where the loss takes them for negatives?

    python bench/copies.py FILE             # JSON lines in which many queries share a document

Trains stage 2 from random weights on the same batches, once with contrastive.without_copies and
once without it, and compares nDCG@10 on held-out queries, query by query, in the mean over seeds.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
from common.options import InputError, cli, read_options, split_words
from data import pairs
from evaluate import Retrieval, shown, summary
from model import NomicBert


@dataclass
class Options:
    steps: int = 100  # of each run
    batch_size: int = 512  # pairs in a step
    seeds: int = 3  # of each of the two


def main(arguments):
    files, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    if len(files) != 1:
        raise InputError("give one file of pairs: python bench/copies.py FILE")
    masked, scores = contrastive.without_copies, {"left out": [], "taken for negatives": []}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        pairs.main([files[0], f"--out={data}"])
        (task,) = Retrieval.open_all(data, "test")
        for seed in range(options.seeds):
            for name, runs in scores.items():
                as_it_is = name == "taken for negatives"
                contrastive.without_copies = (lambda logits, *_: logits) if as_it_is else masked
                out, given = f"{folder}/{name}-{seed}", [f"--data={data}", f"--seed={seed}"]
                given += [f"--steps={options.steps}", f"--batch-size={options.batch_size}"]
                contrastive.main([*given, f"--out={out}", "--eval-every=0"])
                model = NomicBert.from_pretrained(out)
                ranking = task.rank(model, model.config.trained_length)
                runs.append(task.scores(ranking)["nDCG@10"])
    contrastive.without_copies = masked
    means = {name: np.mean(runs, axis=0) for name, runs in scores.items()}
    print(f"\n{len(task.queries)} queries, {len(task.documents):,} documents, nDCG@10\n")
    for name, values in means.items():
        print(f"copies {name:22}{shown(summary(values)):>16}")
    left_out, as_negatives = means.values()
    print(f"difference{'':19}{shown(summary(left_out - as_negatives)):>16}")


if __name__ == "__main__":
    cli(main)
