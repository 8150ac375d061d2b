"""What preparing data costs: speed, memory, opening and random batches.

    python bench/data.py                                         # about five minutes
    python bench/data.py --rows=20000 --large=50000 --rounds=1   # quick

- speed: data/pairs.py on a file of JSON lines (reading, checking, tokenising, comparing with
  held-out text, removing copies, writing), against encode_batch_fast of the tokenizers library
  alone on the same texts in memory; both with as many threads or processes
- memory: the peak of all processes together, at 10,000 rows, half of --large and --large. Mapped
  files do not count: they are the system's cache (Linux only)
- opening: a source of a thousand rows and one of ten million (sparse files), and its first text
- random batches, as contrastive.py draws them

The texts are the pairs of a data folder, each made unique by a number.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import fingerprint, load_tokenizer, read_json
from common.options import InputError, cli, read_options
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
            row = {"query": f"{pair['query']} {i}", "document": f"{pair['document']} {i}"}
            file.write(json.dumps(row) + "\n")
    return path


# ------------------------------------------------------------------------------------------------
# Each of these two runs in a new process


def library_alone(send, file, data, threads):
    """Sends tokens/s of encode_batch_fast on texts in memory."""
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    tokenizer = load_tokenizer(data)
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    texts = [row[name] for row in rows for name in ("query", "document")]
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 2000):
        tokens += sum(map(len, tokenizer.encode_batch_fast(texts[start : start + 2000])))
    send.send(tokens / (time.perf_counter() - began))


def prepared(send, file, data, processes, out):
    """Sends tokens/s of data/pairs.py, and the peak memory of all its processes in MiB."""
    os.environ |= {"RAYON_NUM_THREADS": "1", "HF_DATASETS_CACHE": f"{out}-cache"}
    import datasets  # noqa: F401 (takes two seconds)

    from data import pairs, prepare

    tokenizer, peak, done = load_tokenizer(data), [0], threading.Event()
    held_out = prepare.HeldOut(prepare.held_out_texts(Path(data).glob("retrieval/*")), tokenizer)

    def watch():
        while not done.wait(0.1):
            peak[0] = max(peak[0], memory_of(os.getpid()))

    threading.Thread(target=watch, daemon=True).start()
    prefixes = {"query": "", "document": ""}
    source = pairs.Pairs("bench", 2, prefixes, [str(file)], [("query", "document")])
    began = time.perf_counter()
    sys.stdout = open(os.devnull, "w")
    rows = pairs.load(source.places, limit=0)
    pairs.write_pairs(out, source, rows, tokenizer, held_out, [], processes)
    seconds = time.perf_counter() - began
    done.set()
    send.send((sum(read_json(out / "meta.json")["tokens"].values()) / seconds, peak[0]))


def memory_of(process):
    """MiB of a process and its children. Memory that they share counts once, mapped files not."""
    try:
        sizes = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    own = int(sizes.partition("Pss_Anon:")[2].split()[0]) / 1024 if "Pss_Anon:" in sizes else 0
    return own + sum(map(memory_of, children))


def in_a_process(function, *arguments):
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(send, *arguments))
    process.start()
    send.close()  # so that recv fails if the process does
    result = receive.recv()
    process.join()
    return result


# ------------------------------------------------------------------------------------------------


def measure_speed(options, folder):
    file = write_rows(folder / "rows.jsonl", options.data, options.rows)
    print(f"{'processes':>9}{'tokenizers alone':>20}{'data/pairs.py':>17}{'share':>8}")
    for processes in (1, 2):
        alone, ours = [], []
        for i in range(options.rounds):
            alone.append(in_a_process(library_alone, file, options.data, processes))
            out = folder / f"speed-{processes}-{i}"
            ours.append(in_a_process(prepared, file, options.data, processes, out)[0])
        share = max(ours) / max(alone)
        print(f"{processes:9}{max(alone):12,.0f} tokens/s{max(ours):9,.0f} tokens/s{share:7.0%}")


def measure_memory(options, folder):
    print(f"\n{'rows':>12}{'peak memory, 2 processes and the writer':>44}")
    for rows in (10_000, options.large // 2, options.large):
        file, out = write_rows(folder / f"{rows}.jsonl", options.data, rows), folder / f"out-{rows}"
        _, memory = in_a_process(prepared, file, options.data, 2, out)
        print(f"{rows:12,}{memory:40,.0f} MiB", flush=True)
    return out


def measure_opening(folder, tokenizer, length=64, times=201):
    print(f"\n{'rows':>12}{'opened':>14}{'first text':>14}")
    for rows in (1_000, 10_000_000):
        where = folder / f"open-{rows}"
        where.mkdir()
        for name in ("query", "document"):
            np.arange(0, (rows + 1) * length, length).tofile(where / f"{name}.offsets.bin")
            with open(where / f"{name}.tokens.bin", "wb") as file:
                file.truncate(rows * length * 2)
        meta = {"rows": rows, "tokens": dict.fromkeys(("query", "document"), rows * length)}
        meta |= {"prefixes": {}, "dtype": "uint16", "tokenizer": fingerprint(tokenizer)}
        (where / "meta.json").write_text(json.dumps(meta))
        opened, read = [], []
        for i in range(times):
            began = time.perf_counter()
            source = Source(where, tokenizer)
            opened.append(time.perf_counter() - began)
            source.columns["document"][rows * i // times].sum()
            read.append(time.perf_counter() - began - opened[-1])
        print(f"{rows:12,}{np.median(opened) * 1e3:11.2f} ms{np.median(read) * 1e3:11.2f} ms")


def measure_batches(source):
    size, tokens, began = min(16_384, len(source)), 0, time.perf_counter()
    batches = PairBatches([source], size, seed=0)
    for step in range(max(2, 100_000 // size)):
        _, rows = batches.at(step)
        texts = source.texts("query", rows, 2048) + source.texts("document", rows, 2048)
        tokens += len(pack(texts)[0])
    rate = tokens / (time.perf_counter() - began)
    print(f"\nrandom batches of {size:,} of {len(source):,} rows: {rate:,.0f} tokens/s")


def main(arguments):
    options, _ = read_options(Options, arguments)
    if not list(Path(options.data).glob("stage*/*/pairs.jsonl")):
        raise InputError(f"{options.data} has no pairs: python data/pydocs.py makes out/pydocs")
    tokenizer = load_tokenizer(options.data)
    with tempfile.TemporaryDirectory() as folder:
        measure_speed(options, Path(folder))
        large = measure_memory(options, Path(folder))
        measure_opening(Path(folder), tokenizer)
        measure_batches(Source(large, tokenizer))


if __name__ == "__main__":
    cli(main)
