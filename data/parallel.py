"""Blocks of rows -> ids, in several processes, with a bounded number of blocks under way.

    with tokenizing(tokenizer, held_out, processes=8) as tokenize:
        for block, (columns, own, key, leaks, lines) in tokenize(blocks):

What a row's texts become is decided here once: ids, a key that is equal for copies, and whether a
text of it was held out. data/write.py appends the results to files.
"""

import itertools
import json
import os
import threading
import time
from collections import deque
from contextlib import contextmanager
from multiprocessing import Pool

import numpy as np
from tokenizers import Tokenizer


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
