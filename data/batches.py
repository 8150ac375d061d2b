"""Which pairs make a batch of stages 2 and 3, and in which order the batches come."""

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

    The weight in a source's meta.json says how many times an epoch has its batches; without one it
    is 1, as in the paper. pairs: use so many pairs only, drawn by the seed, the same share of each
    source; 0: all. Raises InputError where no source has rows and a weight above 0."""

    def __init__(self, sources, batch_size, seed, pairs=0):
        self.sources, self.batch_size, self.seed = sources, batch_size, seed
        rows, weight = np.array([len(s) for s in sources]), np.array([s.weight for s in sources])
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
            names = ", ".join(source.name for source in sources)
            raise InputError(f"{names}: no source has rows and a weight above 0")

    def about(self):
        """What a run prints: the sources whose rows are repeated to fill a batch, and weights."""
        sizes = zip(self.sources, self.rows, strict=True)
        small = ", ".join(source.name for source, rows in sizes if rows < self.batch_size)
        weighted = ", ".join(f"{s.name}={s.weight:g}" for s in self.sources if s.weight != 1)
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
