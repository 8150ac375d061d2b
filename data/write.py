"""Texts -> token ids on disk, in a stream: the layout of data/store.py, whatever the size.

    with tokenizing(tokenizer, held_out, processes=8) as tokenize:
        prefixes = {"query": "search_query: ", "document": "search_document: "}
        write_source("out/faq/stage2/faq", rows, prefixes, tokenize, Tally())

rows may be any iterator of {"query": ..., "document": ..., "negatives": [...]}, or of documents
alone. They travel in blocks of a thousand to the processes that tokenise, and what comes back is
appended to the files; a few blocks a process are in memory at a time, and never more.

A kill at any moment loses one block. The files then have no meta.json, and so are no source; the
same call reads the rows again, which is cheap, skips those that are on disk, and goes on. Bytes are
those of a run that was never stopped.
"""

import itertools
import json
import os
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from data.parallel import tokenizing
from data.store import Source, fingerprint
from options import InputError

BLOCK = 1000  # rows that travel together
DUPLICATE, NEAR, EQUAL = "duplicate", "near held-out text", "equal to held-out text"
REMEMBERED = 1 << 19  # rows among which a copy is surely noticed; up to twice as many are kept


class Tally:
    """What happened to rows that were not taken as they are: counted by reason, the first of each
    shown. strict: the first one is an InputError instead."""

    def __init__(self, strict=False, shown=3):
        self.strict, self.shown, self.counts = strict, shown, Counter()

    def add(self, reason, where, detail="", fault=True):
        """fault: whether strict makes an error of it."""
        if self.strict and fault:
            raise InputError(f"{where}: {reason}{detail and ': ' + detail} (--strict)")
        self.counts[reason] += 1
        if self.counts[reason] <= self.shown:
            print(f"  {where}: {reason}{detail and ': ' + detail}")

    def __str__(self):
        return ", ".join(f"{n:,} {reason}" for reason, n in self.counts.items()) or "none"


class Recent:
    """A set of the last numbers that were added: at least `size` and at most twice as many, so that
    its memory does not grow with the source."""

    def __init__(self, size=REMEMBERED):
        self.size, self.new, self.old = size, set(), set()

    def add(self, number):
        """Remembers the number and returns True, unless it is there already: then False."""
        if number in self.new or number in self.old:
            return False
        self.new.add(number)
        if len(self.new) == self.size:
            self.new, self.old = set(), self.new
        return True


def write_json(path, value):
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------
# In the process that writes


class Files:
    """The growing files of a source, each known to be whole up to a recorded size."""

    def __init__(self, folder, inputs):
        """Takes up what an interrupted run with the same inputs left in the folder; else empties
        it."""
        self.folder, self.path = folder, folder / "progress.json"
        self.state = {"blocks": 0, "rows": 0, "tokens": {}, "counts": {}, "sizes": {}}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            before = json.loads(self.path.read_text())
            sizes = before["state"]["sizes"]  # less on disk, after a loss of power: begin anew
            there = [p.stat().st_size >= sizes.get(p.name, 0) for p in folder.iterdir()]
            if before["inputs"] == inputs and all(there):
                self.state = before["state"]
        self.inputs, self.open, self.saved = inputs, {}, time.monotonic()
        for path in folder.iterdir():
            if path.name in self.state["sizes"]:
                os.truncate(path, self.state["sizes"][path.name])
            elif path != self.path:
                path.unlink()

    def append(self, name, data):
        if name not in self.open:
            self.open[name] = open(self.folder / name, "ab")
        self.open[name].write(data)

    def begin(self, column):
        self.append(f"{column}.offsets.bin", np.zeros(1, np.int64).tobytes())
        self.append(f"{column}.tokens.bin", b"")
        self.state["tokens"][column] = 0

    def save(self, every=2.0):
        """Records how far the files are whole, at most every so many seconds."""
        if time.monotonic() - self.saved < every:
            return
        for name, file in self.open.items():
            file.flush()
            self.state["sizes"][name] = file.tell()
        write_json(self.path, {"inputs": self.inputs, "state": self.state})
        self.saved = time.monotonic()

    def close(self):
        for file in self.open.values():
            file.close()


def write_source(folder, rows, prefixes, tokenize, tally, inputs=None, unique=True):
    """Writes rows as a source; a finished one with the same inputs is left alone. Returns its meta.

    rows: {"query", "document", maybe "negatives"}, or {"document"}; "where" says where a row is
    from. prefixes: of query and document. inputs: what decides the rows, such as the files' sizes
    and times: an interrupted run is continued only if they are equal. unique: leave out copies of a
    row. Rows of which a text was held out are left out and counted, whether unique or not."""
    folder = Path(folder)
    inputs = json.loads(json.dumps([inputs, fingerprint(tokenize.tokenizer)]))  # as read again
    if (folder / "meta.json").is_file():
        meta = json.loads((folder / "meta.json").read_text())
        if meta.get("inputs") == inputs:
            return meta
        (folder / "meta.json").unlink()
    files, recent = Files(folder, inputs), Recent()
    state = files.state
    tally.counts.update(state["counts"])  # the reader will read, and count, all rows again
    if state["blocks"] and unique:
        for key in np.fromfile(folder / "keys.bin", np.uint64).tolist():
            recent.add(key)
    try:
        blocks = iter(lambda: list(itertools.islice(rows, BLOCK)), [])
        rows = iter(rows)
        for _ in range(state["blocks"]):  # these are on disk
            next(blocks, None)
        for block, encoded in tokenize(blocks):
            append_block(files, block, encoded, tally, recent if unique else None)
            files.save()
        for name in () if state["tokens"] else list(prefixes) or ["document"]:
            files.begin(name)  # no row was left: columns of nothing
        files.save(every=0)
    finally:
        files.close()
    return finish(files, prefixes, tokenize.tokenizer, tally)


def append_block(files, block, encoded, tally, recent):
    columns, own, key, leaks, lines = encoded
    state = files.state
    keep = leaks == 0
    if recent is not None:
        pairs = zip(keep.tolist(), key.tolist(), strict=True)
        keep = np.fromiter((kept and recent.add(k) for kept, k in pairs), bool, len(keep))
    for i in np.flatnonzero(~keep):
        reason = (DUPLICATE, NEAR, EQUAL)[leaks[i]]
        shown = str(block[i].get("query", block[i]["document"])[:80])
        where = block[i].get("where", f"row {BLOCK * state['blocks'] + i + 1}")
        tally.add(reason, where, repr(shown), fault=reason == DUPLICATE)
        state["counts"][reason] = state["counts"].get(reason, 0) + 1
    for name, (ids, lengths) in columns.items():
        kept = np.repeat(keep, own) if name == "negative" else keep
        if not kept.all():
            ids, lengths = ids[np.repeat(kept, lengths)], lengths[kept]
        if name not in state["tokens"]:
            files.begin(name)
        offsets = state["tokens"][name] + np.cumsum(lengths)
        files.append(f"{name}.tokens.bin", ids.tobytes())
        files.append(f"{name}.offsets.bin", offsets.tobytes())
        state["tokens"][name] += int(lengths.sum())
        state["dtype"] = ids.dtype.name
    if "query" in columns:
        if "negatives" not in state:
            state["negatives"] = 0
            files.append("negative.rows.bin", np.zeros(1, np.int64).tobytes())
        rows = state["negatives"] + np.cumsum(own[keep])
        files.append("negative.rows.bin", rows.tobytes())
        state["negatives"] += int(own[keep].sum())
        kept_lines = itertools.compress(lines, keep.tolist())
        files.append("pairs.jsonl", "".join(kept_lines).encode())
    files.append("keys.bin", key[keep].tobytes())
    state["rows"] += int(keep.sum())
    state["blocks"] += 1


def finish(files, prefixes, tokenizer, tally):
    """Writes meta.json, last of all."""
    folder, state = files.folder, files.state
    names = [name for name in ("query", "document", "negative") if name in state["tokens"]]
    if "negative" in names:
        prefixes = {**prefixes, "negative": prefixes["document"]}
    else:
        for path in folder.glob("negative.*"):
            path.unlink()
    meta = {
        "rows": state["rows"],
        "tokens": {name: state["tokens"][name] for name in names},
        "columns": names,
        "prefixes": prefixes,
        "dtype": state.get("dtype", "uint16"),
        "tokenizer": fingerprint(tokenizer),
    }
    if files.inputs[0] is not None:
        meta |= {"counts": dict(tally.counts), "inputs": files.inputs}
    write_json(folder / "meta.json", meta)
    for path in (folder / "keys.bin", files.path):
        path.unlink(missing_ok=True)
    return meta


def write_columns(folder, columns, prefixes, tokenizer, held_out=None):
    """Writes texts in memory as a source, copies too. columns: name -> texts, as many in each.
    Returns its meta, and how many rows were left out for a held-out text, by reason."""
    names, tally = list(columns), Tally(shown=0)
    rows = (dict(zip(names, texts, strict=True)) for texts in zip(*columns.values(), strict=True))
    with tokenizing(tokenizer, held_out, processes=1) as tokenize:
        meta = write_source(folder, rows, prefixes, tokenize, tally, unique=False)
    return meta, dict(tally.counts)


def stored_rows(source, folder):
    """The rows of a finished source as write_source takes them, with ids in place of texts."""
    path = Path(folder, "pairs.jsonl")
    names = [name for name in ("query", "document") if name in source.columns]
    with open(path, encoding="utf-8") if path.is_file() else nullcontext() as lines:
        for i in range(len(source)):
            row = {name: source.columns[name][i] for name in names}
            if own := source.negatives(i):
                row["negatives"] = [source.columns["negative"][n] for n in own]
            yield {**row, "line": next(lines)} if lines else row


def add_stored(folder, others, tokenizer, held_out, texts=()):
    """Copies sources into one, their held-out text left out, without tokenising them again.

    others: their folders, or data folders, of which stage1/train is meant. texts: documents that
    come first. Returns as write_columns."""
    others = [p / "stage1" / "train" if (p / "stage1").is_dir() else p for p in map(Path, others)]
    sources, tally = [Source(path, tokenizer) for path in others], Tally(shown=0)
    rows = (stored_rows(source, path) for source, path in zip(sources, others, strict=True))
    rows = itertools.chain(({"document": text} for text in texts), *rows)
    prefixes = sources[0].meta["prefixes"] if sources else {}
    with tokenizing(tokenizer, held_out, processes=1) as tokenize:
        meta = write_source(folder, rows, prefixes, tokenize, tally, unique=False)
    return meta, dict(tally.counts)
