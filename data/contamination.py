"""Is a held-out text in the training text? What was seen in training measures memory, not skill.

    held_out = HeldOut.of_tasks(["out/faq/retrieval/faq"], tokenizer)
    held_out.leaks(ids, lengths)      # of each text: 0 no, 1 nearly, 2 the same

Held out are the queries of retrieval tasks and the documents that answer them; the other documents
of a pool may be training text. Texts are compared as the tokenizer's pieces of words: case and
accents as it reads them, punctuation and special tokens left out.

    the same    all pieces are equal, and they are at least 3
    nearly      of the shorter text half the runs of 8 pieces stand in the other, and at least 8 do

So a sentence quoted in a long text is no leak, and a held-out paragraph within one is. A run that
stands in more than 16 held-out texts is a phrase of the trade, and does not count. Text that the
tokenizer cannot read ([UNK]) is not compared.

It is arithmetic on arrays, a small part of what tokenising costs (bench/data.py), and its memory is
that of the held-out text.
"""

from pathlib import Path

import numpy as np

from data.parallel import Encoder, powers, text_hashes
from data.write import EQUAL, NEAR
from retrieval import read_judgements, read_lines, read_texts

RUN, LEAST, SHARE, SHORTEST, COMMON = 8, 8, 0.5, 3, 16
FILTER = 22  # bits of a table that answers most look-ups with no: 4 MiB


def run_hashes(ids, lengths):
    """A number for each run of RUN pieces within one text -> (hashes uint64, text of each)."""
    text = np.repeat(np.arange(len(lengths)), lengths)
    count = max(0, len(ids) - RUN + 1)
    hashes = np.zeros(count, np.uint64)
    for i, power in enumerate(powers(RUN)):
        hashes += (ids[i : i + count].astype(np.uint64) + np.uint64(1)) * power
    whole = text[:count] == text[RUN - 1 :] if count else np.zeros(0, bool)
    hashes = (hashes ^ hashes >> np.uint64(31)) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes[whole], text[:count][whole]


class HeldOut:
    def __init__(self, texts, tokenizer):
        """texts: the held-out ones, in memory."""
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.is_word = np.zeros(max(vocabulary.values()) + 1, bool)
        for token, number in vocabulary.items():
            self.is_word[number] = token not in special and any(map(str.isalnum, token))
        ids, lengths = self.words(*Encoder(tokenizer, None).encode(list(texts)))
        long_enough = lengths >= SHORTEST
        self.texts = np.unique(text_hashes(ids, lengths)[long_enough])
        hashes, owner = run_hashes(ids, lengths)
        pairs = np.unique(np.stack([hashes, owner.astype(np.uint64)]), axis=1)
        _, which, owners = np.unique(pairs[0], return_inverse=True, return_counts=True)
        pairs = pairs[:, owners[which] <= COMMON]
        self.runs, self.owner = pairs[0], pairs[1].astype(np.int64)
        self.size = np.bincount(self.owner, minlength=len(lengths))  # runs of each held-out text
        self.maybe = np.zeros(1 << FILTER, bool)
        self.maybe[self.runs >> np.uint64(64 - FILTER)] = True
        self.count = len(lengths)

    @classmethod
    def of_tasks(cls, folders, tokenizer):
        """The queries and the right documents of tasks in the BEIR layout, all of their splits."""
        return cls(held_out_texts(folders), tokenizer)

    def words(self, ids, lengths):
        """The same texts without what is no piece of a word."""
        kept = self.is_word[ids]
        sums = np.r_[0, np.cumsum(kept)]
        ends = np.cumsum(lengths)
        return ids[kept], sums[ends] - sums[ends - lengths]

    def leaks(self, ids, lengths):
        """ids (N,): of B texts in a row; lengths (B,) -> int8 (B,): 2 the same as a held-out text,
        1 nearly, 0 neither."""
        ids, lengths = self.words(ids, lengths)
        found = np.zeros(len(lengths), np.int8)
        if self.count == 0:
            return found
        hashes, text = run_hashes(ids, lengths)
        likely = self.maybe[hashes >> np.uint64(64 - FILTER)]
        found[self.near(hashes[likely], text[likely], np.bincount(text, minlength=len(found)))] = 1
        found[(lengths >= SHORTEST) & np.isin(text_hashes(ids, lengths), self.texts)] = 2
        return found

    def leaks_of(self, source, rows=10_000):
        """How many texts of a finished source leak, in all of its columns."""
        count = 0
        for column in source.columns.values():
            for i in range(0, len(column), rows):
                ends = np.asarray(column.offsets[i : i + rows + 1])
                count += (self.leaks(column.tokens[ends[0] : ends[-1]], np.diff(ends)) > 0).sum()
        return int(count)

    def near(self, hashes, text, size):
        """Which texts share enough runs with one held-out text. hashes, text: of runs that may be
        shared; size (B,): how many runs each text has."""
        shared = np.unique(np.stack([hashes, text.astype(np.uint64)]), axis=1)  # each run once
        first, last = (np.searchsorted(self.runs, shared[0], side) for side in ("left", "right"))
        owners = last - first  # of each run: 0 if it is in no held-out text, seldom more than 1
        place = np.arange(owners.sum()) - np.repeat(np.cumsum(owners) - owners, owners)
        owner = self.owner[np.repeat(first, owners) + place]
        both = np.stack([np.repeat(shared[1].astype(np.int64), owners), owner])
        (text, owner), count = np.unique(both, axis=1, return_counts=True)
        enough = count >= np.maximum(LEAST, SHARE * np.minimum(size[text], self.size[owner]))
        return np.unique(text[enough])


def held_out_texts(folders):
    """The texts of every query, and of every document that answers one."""
    texts = []
    for folder in map(Path, folders):
        documents, queries = (
            read_texts(folder / f"{name}.jsonl") for name in ("corpus", "queries")
        )
        for path in sorted(Path(folder, "qrels").glob("*.tsv*")):
            plain = path.with_suffix("") if path.suffix == ".gz" else path
            if sum(1 for _ in read_lines(plain)) < 2:  # a split without queries
                continue
            for query, right in read_judgements(plain, queries, documents).items():
                texts += [queries[query], *(documents[name] for name in right)]
    return texts


def contamination(held_out, removed):
    """What meta.json of a data folder says about it. removed: source -> reason -> rows left out."""
    reasons = (NEAR, EQUAL)
    sources = {
        name: {reason: counts[reason] for reason in reasons if reason in counts}
        for name, counts in removed.items()
    }
    sources = {name: counts for name, counts in sources.items() if counts}
    total = sum(sum(counts.values()) for counts in sources.values())
    return {"held-out texts": held_out.count, "removed": total, "sources": sources}
