"""What preparing data costs: speed, memory, opening and random batches.

    python bench/data.py                                         # about five minutes
    python bench/data.py --rows=20000 --large=50000 --rounds=1   # quick

- speed of data/pairs.py on a file of JSON lines, against encode_batch_fast of the tokenizers
  library alone on the same texts in memory, with as many threads as processes
- peak memory of all processes together, without mapped files, which are the system's cache (Linux)
- opening a source of a thousand and of ten million rows (sparse files), and reading a text of it
- random batches, as contrastive.py draws them

The texts are the pairs of a data folder, each made unique by a number.
"""

import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row, run_in_process
from common.files import fingerprint, load_tokenizer, read_json
from common.options import InputError, cli, read_options
from data import pairs
from data.duplicates import HeldOut, held_out_texts
from data.store import PairBatches, Source, pack


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder: its pairs are the texts
    rows: int = 50_000  # of which the speed is measured
    large: int = 1_000_000  # the most rows at which the memory is measured
    rounds: int = 3  # of each measurement of speed; the best counts


def write_rows(path, data, rows):
    """Pairs of a data folder, from all sources alike, each with its number at the end."""
    paths = sorted(Path(data).glob("stage*/*/pairs.jsonl"))
    found = [json.loads(line) for path in paths for line in open(path, encoding="utf-8")]
    order = np.random.default_rng(0).permutation(len(found))
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            pair = found[order[i % len(found)]]
            row = {name: f"{pair[name]} {i}" for name in ("query", "document")}
            file.write(json.dumps(row) + "\n")
    return path


def library_alone(file, data, threads):
    """Tokens/s of encode_batch_fast on texts in memory."""
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    tokenizer, rows = load_tokenizer(data), map(json.loads, open(file, encoding="utf-8"))
    texts = [row[name] for row in rows for name in ("query", "document")]
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 2000):
        tokens += sum(map(len, tokenizer.encode_batch_fast(texts[start : start + 2000])))
    return tokens / (time.perf_counter() - began)


def prepared(file, data, processes, out):
    """Tokens/s of data/pairs.py, and the peak memory of all its processes in MiB."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, peak, done = load_tokenizer(data), [0], threading.Event()
    held_out = HeldOut(held_out_texts(Path(data).glob("retrieval/*")), tokenizer)

    def watch():
        while not done.wait(0.1):
            peak[0] = max(peak[0], memory_of(os.getpid()))

    threading.Thread(target=watch, daemon=True).start()
    source = pairs.Pairs("bench", 2, {"query": "", "document": ""}, [str(file)], [pairs.PUBLISHED])
    began, job = time.perf_counter(), (tokenizer, held_out, set())
    with ProcessPoolExecutor(processes, None, pairs.start_worker, job) as executor:
        encoded = pairs.encode_all(source, pairs.read_rows(source, 0), executor, 2 * processes)
        pairs.write_pairs(out, source, encoded, tokenizer)
    seconds = time.perf_counter() - began
    done.set()
    return sum(read_json(out / "meta.json")["tokens"].values()) / seconds, peak[0]


def memory_of(process):
    """MiB of a process and its children. Memory that they share counts once, mapped files not."""
    try:
        sizes = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    own = int(sizes.partition("Pss_Anon:")[2].split()[0]) / 1024 if "Pss_Anon:" in sizes else 0
    return own + sum(map(memory_of, children))


def measure_opening(folder, tokenizer, rows, length=64, times=201):
    """Milliseconds to open a source, and to read one of its texts."""
    folder.mkdir()
    for name in ("query", "document"):
        np.arange(0, (rows + 1) * length, length).tofile(folder / f"{name}.offsets.bin")
        with open(folder / f"{name}.tokens.bin", "wb") as file:
            file.truncate(rows * length * 2)
    meta = {"rows": rows, "tokens": dict.fromkeys(("query", "document"), rows * length)}
    meta |= {"prefixes": {}, "dtype": "uint16", "tokenizer": fingerprint(tokenizer)}
    (folder / "meta.json").write_text(json.dumps(meta))
    seconds = np.zeros((times, 3))
    for i in range(times):
        seconds[i, 0] = time.perf_counter()
        source = Source(folder, tokenizer)
        seconds[i, 1] = time.perf_counter()
        start = rows * i // times * length
        source.columns["document"].tokens[start : start + length].sum()
        seconds[i, 2] = time.perf_counter()
    return np.median(np.diff(seconds), axis=0) * 1e3


def measure_batches(source):
    size, tokens, began = min(16_384, len(source)), 0, time.perf_counter()
    batches = PairBatches([source], size, seed=0)
    for step in range(max(2, 100_000 // size)):
        _, rows = batches.at(step)
        texts = source.texts("query", rows, 2048) + source.texts("document", rows, 2048)
        tokens += len(pack(texts)[0])
    rate = tokens / (time.perf_counter() - began)
    print(f"\nrandom batches of {size:,} of {len(source):,} rows: {rate:,.0f} tokens/s")


def measure(options, folder):
    file = write_rows(folder / "rows.jsonl", options.data, options.rows)
    print_head("processes", "tokenizers alone, tokens/s", "data/pairs.py, tokens/s", "share")
    for processes in (1, 2):
        alone = ours = 0
        for i in range(options.rounds):
            job = file, options.data, processes
            alone = max(alone, run_in_process(library_alone, *job))
            out = folder / f"speed-{processes}-{i}"
            ours = max(ours, run_in_process(prepared, *job, out)[0])
        print_row(processes, f"{alone:,.0f}", f"{ours:,.0f}", f"{ours / alone:.0%}")
    print()
    print_head("rows", "peak memory, 2 processes and the writer, MiB")
    for rows in (10_000, options.large // 2, options.large):
        file, out = write_rows(folder / f"{rows}.jsonl", options.data, rows), folder / f"out-{rows}"
        _, memory = run_in_process(prepared, file, options.data, 2, out)
        print_row(f"{rows:,}", f"{memory:,.0f}")
    print()
    tokenizer = load_tokenizer(options.data)
    print_head("rows", "opened, ms", "first text, ms")
    for rows in (1_000, 10_000_000):
        opened, read = measure_opening(folder / f"open-{rows}", tokenizer, rows)
        print_row(f"{rows:,}", f"{opened:.2f}", f"{read:.2f}")
    measure_batches(Source(out, tokenizer))


def main(arguments):
    options, _ = read_options(Options, arguments)
    if not list(Path(options.data).glob("stage*/*/pairs.jsonl")):
        raise InputError(f"{options.data} has no pairs: python data/pydocs.py makes out/pydocs")
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    cli(main)
