"""Texts -> token ids on disk, in a stream: the layout of data/store.py, whatever the size.

    with tokenizing(tokenizer, held_out, processes=8) as tokenize:
        write_source("out/faq/stage2/faq", rows, SEARCH, tokenize, tally)

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
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

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


# ------------------------------------------------------------------------------------------------
# In the processes that tokenise


def powers(n, base=0x9E3779B97F4A7C15):
    """base ** 0 ... base ** (n - 1), modulo 2 ** 64. base is odd, so that no power is 0."""
    return np.multiply.accumulate(np.r_[1, np.full(max(0, n - 1), base)].astype(np.uint64))


def text_hashes(ids, lengths):
    """A number for each text that tells it from others: sum of (id + 1) base ** place, modulo
    2 ** 64. ids (N,): of all texts in a row; lengths (B,) -> uint64 (B,)."""
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(ids)) - np.repeat(starts, lengths)
    terms = (ids.astype(np.uint64) + np.uint64(1)) * powers(lengths.max(initial=1))[place]
    sums = np.r_[np.uint64(0), np.cumsum(terms, dtype=np.uint64)]  # wraps around, on purpose
    hashes = sums[starts + lengths] - sums[starts]
    return hashes ^ hashes >> np.uint64(29)


class Encoder:
    """A block of rows -> what goes to disk. One in each process."""

    def __init__(self, tokenizer, held_out):
        self.tokenizer = Tokenizer.from_str(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.dtype = np.uint16 if self.tokenizer.get_vocab_size() <= 65_536 else np.uint32
        self.held_out = held_out

    def encode(self, texts):
        """Texts -> their ids in a row (N,), and the length of each (B,)."""
        if all(isinstance(text, str) for text in texts):
            ids = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        else:  # ids from another source, maybe with strings among them
            ids = [self.tokenizer.encode(t).ids if isinstance(t, str) else t for t in texts]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(itertools.chain.from_iterable(ids), self.dtype, int(lengths.sum()))
        return flat, lengths

    def __call__(self, rows):
        """-> columns: name -> (ids, lengths); own: how many negatives each row has; key of each
        row, equal for copies; leaks of each row (data/contamination.py); its line of JSON."""
        names = [name for name in ("query", "document") if name in rows[0]]
        texts = {name: [row[name] for row in rows] for name in names}
        negatives = [row.get("negatives") or [] for row in rows]
        own = np.fromiter(map(len, negatives), np.int64, len(rows))
        if own.any():
            texts["negative"] = [text for texts in negatives for text in texts]
        columns = {name: self.encode(part) for name, part in texts.items()}

        key, leaks = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.int8)
        for name, (ids, lengths) in columns.items():
            found = self.held_out.leaks(ids, lengths) if self.held_out else None
            if name == "negative":
                if found is not None:
                    np.maximum.at(leaks, np.repeat(np.arange(len(rows)), own), found)
                continue
            key = key * np.uint64(0x9E3779B97F4A7C15) + text_hashes(ids, lengths)
            leaks = leaks if found is None else np.maximum(leaks, found)
        lines = [json_line(row) for row in rows] if "query" in names else []
        return columns, own, key, leaks, lines


def json_line(row):
    if "line" in row:
        return row["line"]
    kept = {"query": row["query"], "document": row["document"]}
    if row.get("negatives"):
        kept["negatives"] = row["negatives"]
    return json.dumps(kept, ensure_ascii=False) + "\n"


def start_process(*arguments):
    global encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    encoder, parent = Encoder(*arguments), os.getppid()

    def leave_with_parent():  # which, killed, cannot end its children
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def encode_block(rows):
    return encoder(rows)


def cores():
    count = getattr(os, "sched_getaffinity", None)
    return len(count(0)) if count else os.cpu_count()


@contextmanager
def tokenizing(tokenizer, held_out=None, processes=0):
    """Gives tokenize(blocks): what Encoder makes of each block, in order. At most three blocks of
    each process are under way, however fast the reader. processes 0: as many as cores; 1: this."""
    processes = processes or cores()
    if processes == 1:
        one = Encoder(tokenizer, held_out)

        def tokenize(blocks):
            return ((block, one(block)) for block in blocks)

        tokenize.tokenizer = tokenizer
        yield tokenize
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the library warns of every fork
    try:
        with Pool(processes, start_process, (tokenizer.to_str(), held_out)) as pool:

            def tokenize(blocks):
                waiting = deque()
                for block in blocks:
                    waiting.append((block, pool.apply_async(encode_block, (block,))))
                    if len(waiting) >= 3 * processes:
                        block, result = waiting.popleft()
                        yield block, result.get()
                for block, result in waiting:
                    yield block, result.get()

            tokenize.tokenizer = tokenizer
            yield tokenize
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


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
        try:
            before = json.loads(self.path.read_text())
            self.state = before["state"] if before["inputs"] == inputs else self.state
        except (OSError, ValueError, KeyError):
            pass
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
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"inputs": self.inputs, "state": self.state}))
        temporary.replace(self.path)
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
        keep &= np.fromiter(map(recent.add, key.tolist()), bool, len(key)) | ~keep
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
    (folder / "keys.bin").unlink(missing_ok=True)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    files.path.unlink()
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
