"""Texts that say nearly the same: copies in the data, and held-out text in the training rows.

One measure serves both: the share of runs of consecutive words that two texts have in common.
"""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data.store import encode
from data.tasks import read_judgements, read_texts, splits_of

REASONS = "", "near held-out text", "equal to held-out text"  # why a training row is left out
# scripts without spaces: Thai and Lao, Burmese, Khmer, Japanese and Chinese
NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{NO_SPACES}]|[^\W{NO_SPACES}]+")


def words(text):
    """The words of a text, in lower case. In scripts without spaces each character is a word."""
    return WORD.findall(text.lower())


class NearDuplicates:
    """Remembers texts, and finds those that are nearly equal to a remembered one.

    A text is a list of words or token ids. Two texts are near duplicates if they share at least
    `share` of the runs (`run` consecutive words) of the one that has fewer, and at least `least`
    runs. A text shorter than a run is one run."""

    def __init__(self, run=5, share=0.4, least=1):
        self.run, self.share, self.least = run, share, least
        self.first = {}  # hash of a run -> number of the first text that has it
        self.sizes = []  # number of a text -> how many different runs it has

    def runs(self, text):
        """The hashes of all runs of a text."""
        shifted = (text[i:] for i in range(max(1, min(self.run, len(text)))))
        return set(map(hash, zip(*shifted, strict=False)))

    def has_near(self, text):
        """Whether a text is a near duplicate of a remembered one."""
        runs = self.runs(text)
        shared = Counter(self.first[run] for run in self.first.keys() & runs)
        return any(
            count >= max(self.least, self.share * min(len(runs), self.sizes[other]))
            for other, count in shared.items()
        )

    def add(self, text):
        runs = self.runs(text)
        for run in runs:
            self.first.setdefault(run, len(self.sizes))
        self.sizes.append(len(runs))

    def add_new(self, texts):
        """Remembers texts in order, without near duplicates. Returns which are new: bool (B,)."""
        new = np.zeros(len(texts), bool)
        for i, text in enumerate(map(words, texts)):
            new[i] = not self.has_near(text)
            if new[i]:
                self.add(text)
        return new


class HeldOut(NearDuplicates):
    """The texts that must not be trained on, compared by their token ids.

    A text repeats a held-out one if they share half of the runs of 8 tokens of the shorter one, and
    at least 8 runs: a quoted paragraph counts, a quoted sentence does not. Special tokens, [UNK]
    and punctuation are left out, or all texts of a script that the tokenizer cannot read would be
    equal."""

    def __init__(self, texts, tokenizer):
        super().__init__(run=8, share=0.5, least=8)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.is_word = np.zeros(max(vocabulary.values()) + 1, bool)
        for token, number in vocabulary.items():
            self.is_word[number] = token not in {"[UNK]", *special} and any(map(str.isalnum, token))
        self.texts = set()  # hashes of texts of at least 3 words
        ids, ends = self.words_of(*encode(tokenizer, texts))
        for start, end in itertools.pairwise(ends):
            text = tuple(ids[start:end].tolist())
            self.add(text)
            if len(text) >= 3:
                self.texts.add(hash(text))
        self.known = np.zeros(1 << 24, bool)
        self.known[self.codes(ids)] = True

    def words_of(self, ids, lengths):
        """The words of a column (N,), and where each text begins and the last ends (B + 1,)."""
        kept = self.is_word[ids]
        ends = np.cumsum([0, *lengths])
        return ids[kept], np.concatenate([[0], np.cumsum(kept)])[ends]

    def codes(self, ids):
        """24 bits for each run of 8 words. Nearly all runs of other texts are not `known`: they are
        passed over without Python's loops. (The last 7 wrap around.)"""
        codes = ids.astype(np.uint64)
        for shift in (1, 2, 4):
            codes = (codes * np.uint64(0x9E3779B97F4A7C15)) ^ np.roll(codes, -shift)
        return codes >> np.uint64(40)

    def find(self, ids, lengths):
        """For each text of a column 2 if it equals a held-out one, 1 if nearly, else 0."""
        ids, ends = self.words_of(ids, lengths)
        known = np.concatenate([[0], np.cumsum(self.known[self.codes(ids)])])
        known = known[np.maximum(ends[1:] - 7, ends[:-1])] - known[ends[:-1]]  # of each text
        found = np.zeros(len(lengths), np.int8)
        for i in np.flatnonzero((known >= self.least) | (np.diff(ends) < 15)):
            text = tuple(ids[ends[i] : ends[i + 1]].tolist())
            found[i] = 2 if hash(text) in self.texts else self.has_near(text)
        return found

    def find_rows(self, columns, negatives=None):
        """For each row the largest `find` of its texts: 0, 1 or 2. As for SourceWriter.append."""
        found = {name: self.find(*column) for name, column in columns.items()}
        rows = np.max([found[name] for name in found if name != "negative"], axis=0)
        if "negative" in found:
            np.maximum.at(rows, np.repeat(np.arange(len(rows)), negatives), found["negative"])
        return rows


def held_out_texts(tasks):
    """The queries of retrieval tasks, and the documents that answer them. Other documents of a task
    may be training text."""
    texts = {}
    for folder in map(Path, tasks):
        documents, queries = (read_texts(folder / f"{n}.jsonl") for n in ("corpus", "queries"))
        for split in splits_of(folder):
            judged = read_judgements(folder / "qrels" / f"{split}.tsv", queries, documents)
            for query, answers in judged.items():
                texts |= dict.fromkeys([queries[query], *(documents[name] for name in answers)])
    return list(texts)


def contamination(held_out, left_out):
    """The entry of meta.json. left_out: source -> Counter of reasons."""
    found = {name: {r: n[r] for r in REASONS[1:] if n[r]} for name, n in left_out.items()}
    found = {name: counts for name, counts in found.items() if counts}
    removed = sum(sum(counts.values()) for counts in found.values())
    return {"held-out texts": len(held_out.sizes), "removed": removed, "sources": found}
