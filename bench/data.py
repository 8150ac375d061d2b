"""What preparing data costs: speed, memory, opening, reading; and the paper's 235 million pairs.

    python bench/data.py                         # about five minutes
    python bench/data.py --rows=20000 --large=50000 --rounds=1                       # quick
    python bench/data.py --pairs=a.jsonl.gz,b.jsonl.gz --tokenizer=FILE         # real lengths

- speed: JSON lines -> a source on disk (reading, checking, tokenising, the held-out check, copies,
  writing), against the tokenizers library's encode_batch_fast alone on the same texts, which are in
  memory already; both with as many threads or processes
- memory: the peak of all processes together, at 10 thousand rows and at --large
- opening: a source of a thousand rows and one of ten million (files with holes), and the first text
- reading: random batches as contrastive.py draws them, against the fastest stage of bench/stages.py
- the paper's data: computed from these rates and from lengths of real pairs, saying what is assumed

The texts are the pairs of a data folder, each made unique by a number.
"""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import store
from data.contamination import HeldOut
from data.jsonl import Options as Prepare
from data.jsonl import json_rows
from data.parallel import tokenizing
from data.rows import Pairs, checked_rows
from data.write import Tally, write_source
from options import InputError, read_options, run

PAPER, RAW = 234_553_344, 470_000_000  # pairs after filtering (table 7) and before (sec. 4.2.1)


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder: its pairs are the texts
    rows: int = 50_000  # of which the speed is measured
    large: int = 1_000_000  # rows at which the memory is measured, beside 10,000
    rounds: int = 3  # of each measurement; the best counts
    stage: int = 52_044  # tokens/s of the fastest stage here (bench/stages.py)
    pairs: str = ""  # JSON lines from which tokens per pair are taken, with commas; empty: DATA
    tokenizer: str = ""  # a tokenizer.json for that; empty: that of DATA
    gpu: float = 4e14  # floating-point operations a second of the GPU that would filter: assumed


def texts_of(data, rows):
    """rows pairs of a data folder, from all sources alike, each with its number at the end."""
    paths = sorted(Path(data).glob("stage*/*/pairs.jsonl"))
    found = [json.loads(line) for path in paths for line in open(path, encoding="utf-8")]
    order = np.random.default_rng(0).permutation(len(found))
    for i in range(rows):
        pair = found[order[i % len(found)]]
        yield {"query": f"{pair['query']} {i}", "document": f"{pair['document']} {i}"}


# ------------------------------------------------------------------------------------------------
# Each of these runs in a process of its own


def library_alone(file, data, threads):
    """tokens/s of encode_batch_fast on texts in memory."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = store.load_tokenizer(data)
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    texts = [row[name] for row in rows for name in ("query", "document")]
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 2000):
        tokens += sum(map(len, tokenizer.encode_batch_fast(texts[start : start + 2000])))
    return tokens / (time.perf_counter() - began)


def prepared(file, data, processes, out):
    """tokens/s of everything, and the peak memory of all processes in MiB."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    tokenizer, tally = store.load_tokenizer(data), Tally(shown=0)
    held_out = HeldOut.of_tasks(sorted(Path(data, "retrieval").glob("*")), tokenizer)
    source = Pairs("bench", 2, ("", ""), lambda: json_rows([Path(file)]))
    began = time.perf_counter()
    with tokenizing(tokenizer, held_out, processes) as tokenize:
        rows = checked_rows(source, Prepare(), tally)
        prefixes = {"query": "", "document": ""}
        meta = write_source(out, rows, prefixes, tokenize, tally, inputs="bench")
    seconds = time.perf_counter() - began
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    own, child = (
        resource.getrusage(who).ru_maxrss / unit
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    memory = own + (child * processes if processes > 1 else 0)
    return sum(meta["tokens"].values()) / seconds, memory


def in_a_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(function, arguments)


def in_a_parent(function, *arguments):
    """The same for a function that starts processes: those of a Pool may not."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=report, args=(queue, function, *arguments))
    process.start()
    result = queue.get()
    process.join()
    return result


def report(queue, function, *arguments):
    # processes start here as they do in a script: by fork on Linux, and not by this one's spawn
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    queue.put(function(*arguments))


# ------------------------------------------------------------------------------------------------


def write_file(path, data, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in texts_of(data, rows))
    return path


def measure_speed(options, folder):
    """processes -> tokens/s of everything."""
    file, rates = write_file(folder / "rows.jsonl", options.data, options.rows), {}
    print(f"{'processes':>9}{'library alone':>16}{'everything':>14}{'share':>8}")
    for processes in (1, 2):
        alone, everything = [], []
        for i in range(options.rounds):
            out = folder / f"speed-{processes}-{i}"
            alone.append(in_a_process(library_alone, file, options.data, processes))
            everything.append(in_a_parent(prepared, file, options.data, processes, out)[0])
        rates[processes] = max(everything)
        share = max(everything) / max(alone)
        print(f"{processes:9}{max(alone):16,.0f}{max(everything):14,.0f}{share:8.0%}", flush=True)
    return rates


def measure_memory(options, folder):
    print(f"\n{'rows':>12}{'peak memory, 2 processes and the writer':>44}")
    for rows in (10_000, options.large):
        file = write_file(folder / "large.jsonl", options.data, rows)
        out = folder / f"memory-{rows}"
        _, memory = in_a_parent(prepared, file, options.data, 2, out)
        print(f"{rows:12,}{memory:40,.0f} MiB", flush=True)
    return out


def measure_opening(options, folder, tokenizer):
    print(f"\n{'rows':>12}{'opened':>14}{'first text':>14}")
    for rows, times in ((1_000, 201), (10_000_000, 201)):
        where, length = folder / f"open-{rows}", 64
        where.mkdir()
        for name in ("query", "document"):
            np.arange(0, (rows + 1) * length, length).tofile(where / f"{name}.offsets.bin")
            with open(where / f"{name}.tokens.bin", "wb") as file:
                file.truncate(rows * length * 2)
        meta = {"rows": rows, "columns": ["query", "document"], "dtype": "uint16"}
        meta |= {"prefixes": {}, "tokenizer": store.fingerprint(tokenizer)}
        (where / "meta.json").write_text(json.dumps(meta))
        opened, read = [], []
        for i in range(times):
            began = time.perf_counter()
            source = store.Source(where, tokenizer)
            opened.append(time.perf_counter() - began)
            source.columns["document"][rows * i // times].sum()
            read.append(time.perf_counter() - began - opened[-1])
        opened, read = (np.median(seconds) * 1e3 for seconds in (opened, read))
        print(f"{rows:12,}{opened:11.2f} ms{read:11.2f} ms", flush=True)


def measure_reading(options, source):
    """Random batches of a source, as contrastive.py draws them: tokens/s."""
    size = min(16_384, len(source))
    batches, tokens, began = store.PairBatches([source], size, seed=0), 0, time.perf_counter()
    for step in range(max(2, 100_000 // size)):
        _, rows = batches.at(step)
        texts = source.texts("query", rows, 2048) + source.texts("document", rows, 2048)
        tokens += len(store.pack(texts)[0])
    rate = tokens / (time.perf_counter() - began)
    print(f"\nrandom batches of {size:,} of {len(source):,} rows, packed: {rate:,.0f} tokens/s,")
    print(f"{rate / options.stage:.0f} times the {options.stage:,} of the fastest stage")


def name_of(path):
    return path.parent.name if path.name == "pairs.jsonl" else path.name.split(".")[0]


def cost_on_paper(options, rates, tokenizer):
    """The paper's pairs: disk, hours of tokenising a core, hours of filtering on a GPU."""
    paths = [Path(name) for name in options.pairs.split(",") if name]
    paths = paths or sorted(Path(options.data).glob("stage*/*/pairs.jsonl"))
    tokenizer = store.load_tokenizer(options.tokenizer) if options.tokenizer else tokenizer
    means = []
    for path in paths:
        rows = [row for _, row in zip(range(2000), json_rows([path]), strict=False)]
        texts = [str(row[name]) for _, row in rows for name in ("query", "document")]
        lengths = [len(encoding) for encoding in tokenizer.encode_batch_fast(texts)]
        means.append((sum(lengths) / len(rows), sum(map(len, texts)) / len(rows), path))
    print("\ntokens of a pair, the first 2,000 of each source, uncut:")
    print("  " + ", ".join(f"{mean:.0f} {name_of(path)}" for mean, _, path in means))
    tokens, characters = np.mean([mean[:2] for mean in means], axis=0)
    width = 2 if tokenizer.get_vocab_size() <= 65_536 else 4
    on_disk = PAPER * (tokens * width + 2 * 8)
    per_token = 2 * 85e6  # of gte-base: 12 layers of 768, embeddings not counted
    operations = RAW * (tokens * per_token + 2 * 768 * 1e6)  # and scores in blocks of a million
    print(
        f"the paper's {PAPER:,} pairs, if they have {tokens:.0f} tokens each (the mean of these):"
    )
    print(f"  {PAPER * tokens / 1e9:,.0f} billion tokens")
    print(f"  {on_disk / 1e9:,.0f} GB of ids and offsets on disk")
    print(
        f"  {PAPER * characters / 1e9:,.0f} GB of text beside them (pairs.jsonl), or a little more"
    )
    print(f"  {PAPER * tokens / rates[1] / 3600:,.0f} hours of one process at the rate above")
    hours = operations / options.gpu / 3600
    print(f"  filtering the {RAW / 1e6:,.0f} million before that with gte-base:")
    print(
        f"  {operations:.1e} operations, {hours:,.0f} hours of a GPU that does {options.gpu:.0e}/s"
    )
    print("assumed: that mean, the GPU's rate, texts read whole; measured: the rate of tokenising")


def main(arguments):
    options, _ = read_options(Options, arguments)
    if not list(Path(options.data).glob("stage*/*/pairs.jsonl")):
        raise InputError(f"{options.data} has no pairs: python data/pydocs.py makes out/pydocs")
    tokenizer = store.load_tokenizer(options.data)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rates = measure_speed(options, folder)
        out = measure_memory(options, folder)
        measure_opening(options, folder, tokenizer)
        measure_reading(options, store.Source(out, tokenizer))
    cost_on_paper(options, rates, tokenizer)


if __name__ == "__main__":
    run(main)
