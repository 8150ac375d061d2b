"""Which sequences make a batch of stage 1."""

import numpy as np

from common.options import InputError
from data.store import Source, permutation


class Sequences:
    """A column as sequences of exactly `length` tokens: texts joined, and split where a sequence is
    full, as the paper packs its text (sec. 4.1.1)."""

    def __init__(self, folder, tokenizer, length):
        self.column, self.length = Source(folder, tokenizer).columns["document"], length
        self.tokens = self.column.tokens
        if len(self) == 0:
            raise InputError(
                f"{folder} has {len(self.tokens):,} tokens, fewer than --seq-len={length}"
            )

    def __len__(self):
        return len(self.tokens) // self.length

    def __getitem__(self, i):
        ids = self.tokens[i * self.length : (i + 1) * self.length]
        return self.column.checked(ids).astype(np.int64)

    def rows(self, step, batch_size, seed):
        """Which sequences make batch number `step`. Every epoch has each once, in a new order."""
        n, places = len(self), range(step * batch_size, (step + 1) * batch_size)
        return np.array([permutation(n, seed, p // n)[p % n] for p in places], np.int64)
