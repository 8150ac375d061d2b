"""Semantic textual similarity (STS): do cosines order pairs of sentences as people do?

People gave each pair a score, say from 0 (unrelated) to 5 (the same). A model gives it a cosine.

    Pearson     the correlation of cosines and scores: do they lie on a line?
    Spearman    the correlation of their ranks: do they come in the same order? This is the usual
                figure, since nothing makes a cosine grow in proportion to a score

A file has a row for each pair: two sentences and a score, as csv or tsv, plain or gzipped.
"""

import csv
from pathlib import Path

import numpy as np

from checkpoint import PREFIXES
from options import InputError
from retrieval import read_lines


def pearson(x, y):
    """sum (x - mean x)(y - mean y) over the product of their lengths; from -1 to 1."""
    x, y = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def ranks(x):
    """The place of each value in their order, from 1; equal ones share the mean of their places."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the place of the last of each value
    return (last - (counts - 1) / 2)[which]


def spearman(x, y):
    """Pearson's correlation of the ranks."""
    return pearson(ranks(x), ranks(y))


def read_pairs(path):
    """(sentences, sentences, scores) of a csv or tsv file; a header is one whose score is a word.

    Raises InputError naming the line that is of another form."""
    path = Path(path)
    separator = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    lines = (line for _, line in read_lines(path))
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=separator, quoting=quoting)
    pairs = []
    for row in reader:
        try:
            first, second, score = row
            pairs.append((first, second, float(score)))
        except ValueError:
            if reader.line_num == 1 and len(row) == 3:
                continue
            raise InputError(
                f"{path}, line {reader.line_num}: not two sentences and a score, but {len(row)} "
                f"fields: {str(row)[:60]}"
            ) from None
    first, second, scores = zip(*pairs, strict=True) if pairs else ((), (), ())
    if len(set(scores)) < 2:
        raise InputError(f"{path}: {len(scores)} scores, of which none differ: no order to find")
    return first, second, scores


def sts(model, path, max_tokens, dims=None):
    """{"Spearman": ..., "Pearson": ..., "pairs": ...} of a model's cosines on the pairs of a file.

    Both sentences take the prefix of classification, as in the paper (sec. 5.2.1)."""
    first, second, scores = read_pairs(path)
    x, y = (
        model.encode([PREFIXES["classification"] + text for text in texts], max_tokens, dims)
        for texts in (first, second)
    )
    cosines = (x * y).sum(1)
    return {
        "Spearman": spearman(cosines, scores),
        "Pearson": pearson(cosines, scores),
        "pairs": len(scores),
    }
