"""Texts that say nearly the same: copies in the data, and held-out text in the training rows.

One measure serves both: the share of runs of consecutive words that two texts have in common.
"""

import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from data.store import encode
from data.tasks import read_judgements, read_texts, splits_of

REASONS = "", "near held-out text", "equal to held-out text"  # why a training row is left out
# scripts without spaces: Thai and Lao, Burmese, Khmer, Japanese and Chinese
NO_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# vowel signs and accents belong to the letter before them, and \w has none of them
MARKS = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
LETTER = rf"[^\W{NO_SPACES}]"  # or number or _
# (?!...) is for speed: MARKS is a slow class, and what follows English words is below it
WORD = re.compile(rf"[{NO_SPACES}][{MARKS}]*|{LETTER}+(?:(?![\0-\u02ff])[{MARKS}]+{LETTER}*)*")


def words(text):
    """The words of a text, in lower case: letters, marks, numbers and _. In scripts without spaces
    each character is a word."""
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
        self.texts = set()  # of at least 3 words
        for text in map(self.words_of, encode(tokenizer, texts)):
            self.add(text)
            if len(text) >= 3:
                self.texts.add(text)

    def words_of(self, ids):
        return tuple(ids[self.is_word[ids]].tolist())

    def find(self, ids):
        """2 if a text, as token ids, equals a held-out one, 1 if nearly, else 0."""
        text = self.words_of(ids)
        return 2 if text in self.texts else int(self.has_near(text))


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
    """The entry of meta.json. left_out: source -> reason -> number of rows."""
    found = {name: {r: n[r] for r in REASONS if r in n} for name, n in left_out.items()}
    found = {name: counts for name, counts in found.items() if counts}
    removed = sum(sum(counts.values()) for counts in found.values())
    return {"held-out texts": len(held_out.sizes), "removed": removed, "sources": found}
