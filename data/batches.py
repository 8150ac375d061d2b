"""Which pairs make a batch of stages 2 and 3, and in which order the batches come."""

import re

import numpy as np

from common.options import InputError
from data.store import permutation


class PairBatches:
    """Batches of pairs, each from a single source (sec. 4.2.2): otherwise a model could tell a
    positive from a negative by its source.

    An epoch is every whole batch of every source once, in random order, so that sources come up in
    proportion to their size, as in the released reader. Rows that do not fill a batch are left out
    of that epoch; every epoch shuffles the rows anew. A source that is smaller than a batch gives
    one, with its rows repeated: the loss does not count copies of a document as negatives.

    weights, such as "faq=2,halves=0.5": how many times an epoch has the batches of a source. The
    default is the weight in its meta.json, else 1, as in the paper. pairs: use so many pairs only,
    drawn by the seed, the same share of each source; 0: all. Raises InputError for a name that no
    source has, and for a weight that is no number."""

    def __init__(self, sources, batch_size, seed, weights="", pairs=0):
        self.sources, self.batch_size, self.seed = sources, batch_size, seed
        self.weights = read_weights(weights, {s.name: s.weight for s in sources})
        rows, weight = np.array([len(s) for s in sources]), np.array([*self.weights.values()])
        self.drawn = None  # source -> its rows that are used; None: all
        if 0 < pairs < rows.sum():
            counts = np.round(rows * pairs / rows.sum()).astype(int)
            self.drawn = [
                permutation(n, seed)[:count] for n, count in zip(rows, counts, strict=True)
            ]
            rows = counts
        self.rows, least = rows, np.minimum(1, rows)  # batches of a source, unless it is empty
        self.whole = np.maximum(rows // batch_size, least)
        # a source that is smaller than a batch counts by its rows
        batches = np.round(np.minimum(self.whole, rows / batch_size) * weight).astype(int)
        batches = np.where(weight > 0, np.maximum(batches, least), 0)
        self.source_of = np.repeat(np.arange(len(sources)), batches)  # batch of an epoch -> source
        if len(self.source_of) == 0:
            raise InputError(f"{', '.join(self.weights)}: no source has rows and a weight above 0")

    def about(self):
        """What a run prints: the sources whose rows are repeated to fill a batch, and weights."""
        sizes = zip(self.weights, self.rows, strict=True)
        small = ", ".join(name for name, rows in sizes if rows < self.batch_size)
        weighted = ", ".join(f"{name}={w:g}" for name, w in self.weights.items() if w != 1)
        lists = {"smaller than a batch, rows repeated:": small, "weights": weighted}
        return {title: names for title, names in lists.items() if names}

    def at(self, step):
        """(source, rows) of batch number `step`."""
        epoch, place = divmod(step, len(self.source_of))
        batch = permutation(len(self.source_of), self.seed, epoch)[place]
        number = int(self.source_of[batch])
        batch = int(batch - np.searchsorted(self.source_of, number))  # among those of the source
        # with a weight above 1 a source comes round again, with its rows in another order
        again, batch = divmod(batch, int(self.whole[number]))
        order = permutation(int(self.rows[number]), self.seed, epoch, number, again)
        # np.resize repeats the rows of a small source
        rows = np.resize(order[batch * self.batch_size :], self.batch_size).astype(np.int64)
        rows = rows if self.drawn is None else self.drawn[number][rows].astype(np.int64)
        return self.sources[number], rows


def read_weights(text, weights):
    """ "faq=2" -> name -> weight, of all sources. weights: name -> the one it has by itself."""
    weights = dict(weights)
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        if name not in weights or not re.fullmatch(r"\d{1,3}(\.\d+)?", value):
            names = ", ".join(weights)
            raise InputError(f"--weights={entry}: give NAME=NUMBER, below 1,000, of {names}")
        weights[name] = float(value)
    return weights
