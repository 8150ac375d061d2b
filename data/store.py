"""Token ids on disk, and the batches that all three stages draw from them.

A column of texts is two flat files, so that opening it costs the same at a thousand texts and at
235 million:

    query.tokens.bin     uint16 or uint32   the ids of all texts in a row, each as [CLS] ... [SEP]
    query.offsets.bin    int64 (n + 1,)     text i is tokens[offsets[i] : offsets[i + 1]]

A row may have negatives of its own, any number of them. They are a third column, and a file that
says whose they are; a source without has neither file:

    negative.tokens.bin, negative.offsets.bin   as above, the negatives of all rows in a row
    negative.rows.bin    int64 (rows + 1,)      those of row i are texts rows[i] ... rows[i + 1] - 1

A source is a folder of columns with a meta.json, which is written last. A data folder is sources of
one tokenizer:

    tokenizer.json   meta.json        what it was made from; written last
    stage1/SPLIT/                     one column, document; SPLIT is train, dev, test or long
    stage2/NAME/   stage3/NAME/       columns query and document, maybe negative; pairs.jsonl has
                                      them as text
    retrieval/NAME/                   evaluation, in the BEIR layout: corpus.jsonl, queries.jsonl,
                                      qrels/SPLIT.tsv; and meta.json with the task prefixes

Which rows make batch number t is a pure function of (seed, t). It depends neither on the number of
processes nor on micro-batches, evaluation or restarts; so a resumed run needs no saved reader, and
two runs with one seed are equal. What writes all this is data/write.py.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from options import InputError

# ------------------------------------------------------------------------------------------------
# The tokenizer


def load_tokenizer(folder):
    """The tokenizer.json of a data folder or a checkpoint directory, or that file itself. It
    neither cuts nor pads."""
    path = Path(folder) / "tokenizer.json" if Path(folder).suffix != ".json" else Path(folder)
    if not path.is_file():
        raise InputError(
            f"{path} is missing: {folder} is no data folder and no checkpoint directory"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def fingerprint(content):
    """16 hexadecimal digits of the SHA-256 of a tokenizer, or of a file given by its path.

    Token ids fit a model if and only if both were made with the same tokenizer."""
    is_tokenizer = isinstance(content, Tokenizer)
    content = content.to_str().encode() if is_tokenizer else Path(content).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Texts on disk


class Column:
    """`column[i]` is the ids of text i, `column.tokens` all of them in one flat array."""

    def __init__(self, folder, name, dtype):
        path = folder / f"{name}.tokens.bin"
        empty = path.stat().st_size == 0  # nothing can be mapped then
        self.tokens = np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        self.offsets = np.memmap(folder / f"{name}.offsets.bin", dtype=np.int64, mode="r")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


class Source:
    """A folder of columns. meta.json: rows, tokens, task prefixes, fingerprint of the tokenizer."""

    def __init__(self, folder, tokenizer):
        """Raises InputError where the folder is not one, or was made with another tokenizer."""
        folder = Path(folder)
        self.name = folder.name
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            names, dtype, prefixes = (self.meta[key] for key in ("columns", "dtype", "prefixes"))
            self.columns = {name: Column(folder, name, dtype) for name in names}
            if "negative" in names:
                rows = np.memmap(folder / "negative.rows.bin", dtype=np.int64, mode="r")
                self.first_negative = rows
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} is not a source of texts: {error!r}") from None
        if self.meta["tokenizer"] != fingerprint(tokenizer):
            raise InputError(
                f"{folder} was made with another tokenizer ({self.meta['tokenizer']}) than the "
                f"model's ({fingerprint(tokenizer)}): begin with stage 1 on this data, or with "
                "random weights"
            )
        self.prefixes = {
            name: tokenizer.encode(prefix, add_special_tokens=False).ids
            for name, prefix in prefixes.items()
        }

    def __len__(self):
        return self.meta["rows"]

    def negatives(self, row):
        """Which texts of column "negative" are this row's own: a range, empty where there are none;
        texts("negative", source.negatives(row), n) reads them, with the documents' prefix."""
        if "negative" not in self.columns:
            return range(0)
        return range(int(self.first_negative[row]), int(self.first_negative[row + 1]))

    def texts(self, column, rows, max_tokens):
        """Rows as the model reads them: [CLS] prefix text [SEP], cut. A list of id arrays."""
        texts = []
        for row in rows:
            ids = self.columns[column][row]
            ids = np.concatenate([ids[:1], self.prefixes[column], ids[1:]]).astype(np.int64)
            texts.append(cut(ids, max_tokens))
        return texts


def cut(ids, max_tokens):
    """The first max_tokens ids of a text, with its [SEP] at the end."""
    if len(ids) <= max_tokens:
        return ids
    return np.concatenate([ids[: max_tokens - 1], ids[-1:]])


def open_sources(folder, tokenizer):
    """All sources in a folder, in the order of their names."""
    found = [path.parent for path in sorted(Path(folder).glob("*/meta.json"))]
    if not found:
        raise InputError(f"no sources in {folder}: a script in data/ makes them, such as jsonl.py")
    return [Source(path, tokenizer) for path in found]


# ------------------------------------------------------------------------------------------------
# Batches


def shuffled(index, n, seed):
    """Where the numbers `index` (an array, each below n) stand in a shuffle of range(n).

    A Feistel network permutes the numbers below a power of four; walking on until the result is
    below n makes that a permutation of range(n). It needs no memory, where a shuffled list of 235
    million rows takes 2 GB."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))  # bits of each half of a number
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(1 << 63, size=4, dtype=np.uint64)

    def permute(x):
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, on purpose
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return left << half | right

    x = permute(np.asarray(index, np.uint64))
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x.astype(np.int64)


class Sequences:
    """A column as sequences of exactly `length` tokens: texts joined, and split where a sequence is
    full, as the paper packs its text (sec. 4.1.1)."""

    def __init__(self, folder, tokenizer, length):
        self.tokens, self.length = Source(folder, tokenizer).columns["document"].tokens, length
        if len(self) == 0:
            raise InputError(f"{folder} has {len(self.tokens)} tokens: none of {length} in a row")

    def __len__(self):
        return len(self.tokens) // self.length

    def __getitem__(self, i):
        return self.tokens[i * self.length : (i + 1) * self.length].astype(np.int64)

    def rows(self, step, batch_size, seed):
        """Which sequences make batch number `step`. Every epoch has each once, in a new order."""
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = places // len(self), places % len(self)
        parts = [(places[epochs == e], [seed, e]) for e in np.unique(epochs)]
        return np.concatenate([shuffled(part, len(self), key) for part, key in parts])


class PairBatches:
    """Batches of pairs, each from a single source (sec. 4.2.2): else a model could tell a positive
    from a negative by its source.

    An epoch is every whole batch of every source once, in random order, so that sources come up in
    proportion to their size, as with the released reader. Rows that do not fill a batch are left
    out of that epoch; every epoch shuffles the rows anew."""

    def __init__(self, sources, batch_size, seed):
        self.sources, self.batch_size, self.seed = sources, batch_size, seed
        batches = [len(source) // batch_size for source in sources]
        self.source_of = np.repeat(np.arange(len(sources)), batches)  # batch of an epoch -> source
        if len(self.source_of) == 0:
            most = max(len(source) for source in sources)
            raise InputError(f"--batch-size={batch_size}: the largest source has {most} rows")

    def at(self, step):
        """(source, rows) of batch number `step`."""
        epoch, place = divmod(step, len(self.source_of))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source_of))
        which = self.source_of[order[place]]
        number = order[place] - np.searchsorted(self.source_of, which)  # within its source
        rows = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        source = self.sources[which]
        return source, shuffled(rows, len(source), [self.seed, epoch, int(which)])


def pack(texts, device="cpu"):
    """A list of B id arrays -> tokens (N,) int64 on the device, one text after another and no
    padding, and cu_seqlens (B + 1,) int32 on the CPU, where each begins and the last ends."""
    lengths = [len(text) for text in texts]
    if 0 in lengths:
        raise InputError(f"text {lengths.index(0)} of the batch has no tokens, so no embedding")
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    tokens = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    return send(tokens, device), cu_seqlens


def send(array, device):
    """A tensor or numpy array to a device. To a GPU through pinned memory, so that nobody waits:
    the copy takes its turn behind what the GPU was asked to do before."""
    array, device = torch.as_tensor(array), torch.device(device)
    if device.type == "cuda" and array.device.type == "cpu":
        return array.pin_memory().to(device, non_blocking=True)
    return array.to(device)


def micro_batches(lengths, max_tokens):
    """Cuts texts into groups of at most max_tokens tokens (a longer text stands alone).

    List of index arrays. Texts of similar length come together, the longest first: attention calls
    are few, memory is flat, and what would not fit fails at once and not after an hour."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups, start, filled = [], 0, 0
    for i, text in enumerate(order):
        if i > start and filled + lengths[text] > max_tokens:
            groups.append(order[start:i])
            start, filled = i, 0
        filled += lengths[text]
    return [*groups, order[start:]]
