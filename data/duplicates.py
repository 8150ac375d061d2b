"""Texts that say nearly the same: copies in the data, and held-out text in the training rows.

One measure serves both: the share of runs of consecutive words that two texts have in common.
"""

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data.tasks import read_judgements, read_texts, splits_of
from data.tokenizer import encode

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


def runs_of(text):
    """The hashes of all runs of 5 words of a text; one that is shorter is one run."""
    text = words(text)
    return set(map(hash, zip(*(text[i:] for i in range(max(1, min(5, len(text))))), strict=False)))


def is_near(runs, others, sizes, share, least=1):
    """others: the texts that have one of these runs, once for each; sizes: of the other texts."""
    shared = Counter(others).items()
    return any(count >= max(least, share * min(len(runs), sizes[i])) for i, count in shared)


class NearDuplicates:
    """Remembers texts, and finds those that are nearly equal to a remembered one: that share at
    least `share` of the runs of the one that has fewer. A run that several remembered texts have
    counts for the first of them."""

    def __init__(self, share=0.4):
        self.share = share
        self.first = {}  # hash of a run -> number of the first text that has it
        self.sizes = []  # number of a text -> how many different runs it has

    def has_near(self, runs):
        return is_near(runs, map(self.first.get, self.first.keys() & runs), self.sizes, self.share)

    def add_new(self, texts):
        """Remembers texts in order, without near duplicates. Returns which are new: bool (B,)."""
        new = np.zeros(len(texts), bool)
        for i, runs in enumerate(map(runs_of, texts)):
            new[i] = not self.has_near(runs)
            if new[i]:
                for run in runs:
                    self.first.setdefault(run, len(self.sizes))
                self.sizes.append(len(runs))
        return new


class HeldOut:
    """The texts that must not be trained on, compared by the token ids of their words.

    A text repeats a held-out one if all words are the same, or if they share half of the runs of 8
    tokens of the shorter one, and at least 8: a quoted paragraph counts, a quoted sentence does
    not. Special tokens, punctuation and [UNK] are no words, or all texts of a script that the
    tokenizer cannot read would be equal; one or two words beside an [UNK] equal nothing."""

    def __init__(self, texts, tokenizer):
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.unknown = vocabulary["[UNK]"]
        self.is_word = np.zeros(max(vocabulary.values()) + 1, bool)
        for token in vocabulary.keys() - special - {"[UNK]"}:
            letters = (unicodedata.category(c)[0] in "LMN" for c in token)
            self.is_word[vocabulary[token]] = any(letters)
        self.texts, self.sizes = set(), []
        self.texts_with = defaultdict(list)  # hash of a run -> numbers of all texts that have it
        self.first_bits = np.zeros(1 << 26, bool)  # of the hashes: most other runs are not there
        for text, runs in self.read(encode(tokenizer, texts)):
            self.texts.add(text)
            self.first_bits[runs >> 38] = True
            runs = set(runs.tolist())
            for run in runs:
                self.texts_with[run].append(len(self.sizes))
            self.sizes.append(len(runs))

    def read(self, texts):
        """Yields the words of each text (token ids) as bytes, b"" where they equal nothing, and the
        hashes of its runs: polynomials in the ids modulo 2^64, computed for all texts at once."""
        words = [text[self.is_word[text]] for text in texts]
        ids = np.concatenate([*words, np.zeros(7, np.uint64)])
        hashes, start = np.zeros(len(ids) - 7, np.uint64), 0
        for i in range(8):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + len(hashes)]
        for text, own in zip(texts, words, strict=True):
            comparable = len(own) > 2 or self.unknown not in text
            yield own.tobytes() * comparable, hashes[start : start + max(0, len(own) - 7)]
            start += len(own)

    def find(self, texts):
        """For each text, as token ids: 2 if it equals a held-out one, 1 if nearly, else 0."""
        repeats = []
        for text, runs in self.read(texts):
            # first_bits has nearly all that is needed, and takes a fraction of the time
            near = np.count_nonzero(self.first_bits[runs >> 38]) >= 8
            if near:
                runs = set(runs.tolist())
                others = itertools.chain.from_iterable(self.texts_with.get(r, ()) for r in runs)
                near = is_near(runs, others, self.sizes, share=0.5, least=8)
            repeats.append(2 if text and text in self.texts else int(near))
        return repeats


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
    sources = {name: {r: n[r] for r in REASONS if r in n} for name, n in left_out.items()}
    sources = {name: counts for name, counts in sources.items() if counts}
    removed = sum(sum(counts.values()) for counts in sources.values())
    return {"held-out texts": len(held_out.sizes), "removed": removed, "sources": sources}
