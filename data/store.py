"""Token ids on disk, and the batches that all three stages read from them.

A column of texts is two flat files, so that opening it costs the same for a thousand texts and for
235 million:

    query.tokens.bin     uint16 or uint32   the ids of all texts in a row, each as [CLS] ... [SEP]
    query.offsets.bin    int64 (n + 1,)     text i is tokens[offsets[i] : offsets[i + 1]]

A row may have any number of negatives of its own: a third column, and a file that says which of
its texts belong to which row.

    negative.tokens.bin, negative.offsets.bin   as above, the negatives of all rows
    negative.rows.bin    int64 (rows + 1,)      row i has the texts rows[i] ... rows[i + 1] - 1

A source is a folder of columns with a meta.json, which is written last. A data folder holds sources
of one tokenizer:

    tokenizer.json   meta.json        how the folder was made; written last
    stage1/SPLIT/                     one column, document; SPLIT is train, dev, test or long
    stage2/NAME/   stage3/NAME/       columns query, document, maybe negative; pairs.jsonl has the
                                      same rows as text
    retrieval/NAME/                   evaluation tasks in the BEIR layout (data/tasks.py)
    search/corpus.jsonl               what `evaluate.py search` searches

Which rows make batch number t is a pure function of (seed, t). It depends neither on the number of
processes nor on micro-batches, evaluation or restarts, so a resumed run needs no saved reader.
data/prepare.py writes these files.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch

from common.device import move_to_device
from common.files import fingerprint, read_json
from common.options import InputError

# ------------------------------------------------------------------------------------------------
# Texts on disk


class Column:
    """column[i] is the ids of text i, column.tokens all ids in one flat array.

    Opening checks the sizes of the files, in constant time. The offsets and ids of a text are
    checked when it is read."""

    def __init__(self, folder, name, dtype, tokens, tokenizer):
        """tokens: how many there should be. Raises InputError where the files do not fit that."""
        self.path = folder / f"{name}.tokens.bin"
        self.ends, self.vocab_size = tokenizer.encode("").ids, tokenizer.get_vocab_size()
        self.offsets = map_file(folder / f"{name}.offsets.bin", np.int64)
        self.tokens = map_file(self.path, dtype)
        if not len(self.tokens) == tokens == (self.offsets[-1] if len(self.offsets) else -1):
            raise InputError(
                f"{self.path} is damaged: it has {len(self.tokens):,} tokens, meta.json says "
                f"{tokens:,}; prepare the data again"
            )

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        start, end = self.offsets[i], self.offsets[i + 1]
        ids = self.tokens[start:end]
        if not 0 <= start < end <= len(self.tokens) or [ids[0], ids[-1]] != self.ends:
            raise InputError(f"{self.path} is damaged at text {i}; prepare the data again")
        return self.checked(ids)

    def checked(self, ids):
        """Ids that the model has embeddings for. Raises InputError for others."""
        if ids.max() >= self.vocab_size:
            raise InputError(f"{self.path} is damaged: id {ids.max()} of {self.vocab_size}")
        return ids


def map_file(path, dtype):
    """A memory-mapped array. An empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


class Source:
    """A folder of columns. meta.json: rows, tokens, prefixes, fingerprint of the tokenizer, and
    maybe a weight (data/batches.py)."""

    def __init__(self, folder, tokenizer):
        """Raises InputError where the folder is damaged, or was made with another tokenizer."""
        folder = Path(folder)
        self.name, self.meta = folder.name, read_json(folder / "meta.json")
        try:
            self.rows, self.weight = self.meta["rows"], self.meta.get("weight", 1)
            if type(self.weight) not in (int, float) or not 0 <= self.weight <= 1e6:
                raise ValueError(f"weight {self.weight!r:.20} in meta.json, not from 0 to 1e6")
            self.columns = {
                name: Column(folder, name, self.meta["dtype"], tokens, tokenizer)
                for name, tokens in self.meta["tokens"].items()
            }
            self.prefixes = {
                name: tokenizer.encode(prefix, add_special_tokens=False).ids
                for name, prefix in self.meta["prefixes"].items()
            }
            sizes = {name: len(column) for name, column in self.columns.items()}
            if "negative" in self.columns:
                self.first_negative = map_file(folder / "negative.rows.bin", np.int64)
                sizes["negative"] = len(self.first_negative) - 1
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} is not a source of texts: {error!r}") from None
        if set(sizes.values()) != {self.rows}:
            raise InputError(f"{folder} is damaged: {sizes} rows, meta.json says {self.rows}")
        if self.meta.get("tokenizer") != fingerprint(tokenizer):
            raise InputError(
                f"{folder} was made with another tokenizer than the model's: start from random "
                "weights, or with stage 1 on this data"
            )

    def __len__(self):
        return self.rows

    def negatives(self, row):
        """Which texts of the column "negative" belong to a row: a range, maybe empty."""
        if "negative" not in self.columns:
            return range(0)
        return range(*self.first_negative[row : row + 2].tolist())

    def texts(self, column, rows, max_tokens):
        """Rows as the model reads them: [CLS] prefix text [SEP], truncated. A list of id arrays."""
        prefix, texts = self.prefixes[column], [self.columns[column][row] for row in rows]
        texts = [np.concatenate([ids[:1], prefix, ids[1:]]).astype(np.int64) for ids in texts]
        return [truncate(ids, max_tokens) for ids in texts]


def truncate(ids, max_tokens):
    """The first max_tokens ids of a text, with its [SEP] at the end."""
    if len(ids) <= max_tokens:
        return ids
    return np.concatenate([ids[: max_tokens - 1], ids[-1:]])


def open_sources(folder, tokenizer):
    """All sources in a folder, in the order of their names."""
    folders = [path.parent for path in sorted(Path(folder).glob("*/meta.json"))]
    if not folders:
        raise InputError(f"no sources in {folder}: data/pydocs.py, folder.py or pairs.py make some")
    return [Source(path, tokenizer) for path in folders]


# ------------------------------------------------------------------------------------------------
# Random order


@functools.lru_cache(maxsize=64)
def permutation(n, *seed):
    """range(n) in random order: 260 MB for the paper's largest source, which is why it is kept."""
    return np.random.default_rng(seed).permutation(n).astype(np.int32 if n < 2**31 else np.int64)


# ------------------------------------------------------------------------------------------------
# From texts and rows to what the model reads


def pack(texts, device="cpu"):
    """A list of B id arrays -> tokens (N,) int64 on the device, one text after another without
    padding, and cu_seqlens (B + 1,) int32 on the CPU: where each text begins, and the last ends."""
    lengths = [len(text) for text in texts]
    if 0 in lengths:
        raise InputError(f"text {lengths.index(0)} of the batch has no tokens, so no embedding")
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    tokens = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    return move_to_device(tokens, device), cu_seqlens


def text_keys(texts):
    """A number for each of B texts (id arrays), (B,) int64: equal for equal texts, everywhere."""
    digests = [hashlib.blake2b(text.tobytes(), digest_size=8).digest() for text in texts]
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())


def distinct(keys):
    """Numbers equal keys alike. keys: n byte strings, m different ones -> first (m,): the place of
    the first of each different key; number (n,): which of the m keys each one is."""
    numbers = {}  # of 64 bits of each key, to save memory
    number = np.fromiter((numbers.setdefault(hash(k), len(numbers)) for k in keys), np.int64)
    return np.unique(number, return_index=True)[1], number


def split_by_tokens(lengths, max_tokens):
    """Splits texts into micro-batches of at most max_tokens tokens (a longer text stands alone).

    Returns a list of index arrays. Texts of similar length come together, the longest first: so
    attention needs few calls, memory is flat, and what does not fit fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups, start, filled = [], 0, 0
    for i, text in enumerate(order):
        if i > start and filled + lengths[text] > max_tokens:
            groups.append(order[start:i])
            start, filled = i, 0
        filled += lengths[text]
    return [*groups, order[start:]]
