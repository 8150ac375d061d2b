"""JSON lines, CSV, Parquet or data sets of the hub -> a data folder; the paper's data too.

    {"query": "...", "document": "...", "negatives": ["...", "..."]}       negatives may be missing

    python data/pairs.py faq.jsonl tickets.csv              # two sources of stage 2, in out/pairs
    python data/pairs.py labelled.parquet --stage=3         # and one of stage 3 in the same folder
    python data/pairs.py papers.jsonl.gz:clustering         # with the task prefix of both sides
    python data/pairs.py faq.jsonl:search_query:search_document         # or of each, the default
    python data/pairs.py news.jsonl --columns=title,body --text=notes.txt,wiki.jsonl.gz
    python data/pairs.py --paper --list                     # the paper's sources, data/paper.tsv
    python data/pairs.py --paper --local=DIR                # from local copies of any of them
    python data/pairs.py --paper --sources=squad,eli5 --limit=10000     # a sample, from the hub

A file is a source, and so is a folder of files. Its first 100,000 rows give up to --queries
held-out queries: a retrieval task of its name. The documents are the text of stage 1, unless --text
names files. Faulty rows are left out and counted by reason. The first call decides the tokenizer
and the text of stage 1; later calls add sources, and what these hold out is removed from the
earlier ones. A killed run leaves OUT as it was, and the next one reuses what the `datasets` library
has cached. This was never run against the hub itself, only on local files of each form.
"""

import csv
import functools
import gc
import glob
import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import read_json, read_lines, write_json
from common.options import InputError, cli, read_options, split_words
from data import prepare
from data.store import Source
from data.tasks import read_texts, write_jsonl, write_task

SAMPLE = 100_000  # rows of a source from which queries are held out and the tokenizer is trained
LONGEST = 20_000  # characters of a text that are kept
CUT, HELD_OUT = f"cut to {LONGEST:,} characters", "held out"  # faults of rows
JSON_LINE = "line of JSON"  # the column of a data set that is still to be parsed
PUBLISHED = ("query", "document", "negatives")
ST = "sentence-transformers/embedding-training-data"
SUFFIX = re.compile(r"\.(jsonl?|ndjson|txt|csv|tsv|parquet)(\.gz)?$")


@dataclass
class Options:
    out: str = "out/pairs"  # the data folder to write, or to add sources to
    stage: str = ""  # 2, weak pairs (default), or 3, supervised; with --paper: several of 1,2,3
    columns: str = "query,document,negatives"  # the names of query, document and negatives
    text: str = ""  # text for stage 1: files, plain or JSON lines with "text", with commas
    tokenizer: str = ""  # a tokenizer.json to use; default: the one in OUT, or a new one
    vocab_size: int = 8192  # of the new tokenizer; the paper has 30,522 [300, 1000000]
    queries: int = 1000  # held-out queries of each source, at most [0, 1000000]
    pool: int = 10_000  # documents that a retrieval task searches, at most
    held_out: str = ""  # further retrieval tasks that must not be trained on, with commas
    limit: int = 0  # rows of each source; 0: all [0, 1e12]
    processes: int = 0  # that tokenise; 0: as many as cores [0, 256]
    show: int = 0  # how many pairs to print, drawn at random from all sources [0, 1000]
    paper: bool = False  # read the sources of data/paper.tsv
    list: bool = False  # with --paper: print them, and prepare nothing
    local: str = ""  # with --paper: a folder of local copies, files or folders of NAME or BUCKET
    sources: str = ""  # with --paper: names, with commas; default: all that can be had


@dataclass
class Pairs:
    """A source that is not read yet."""

    name: str
    stage: int  # 2 or 3; 1: documents alone
    prefixes: dict  # of query and document
    places: list  # files, or names on the hub
    columns: list  # names of query, document and negatives; the first tuple that a row has counts


# ------------------------------------------------------------------------------------------------
# Reading


def load(places, limit):
    """The rows of files, or of "NAME CONFIG" or "NAME:FILES" on the hub, as a datasets.Dataset.
    Lines of JSON become one column of strings: then a faulty line does not spoil the whole file."""
    try:
        import datasets
    except ImportError:
        install = "pip install -r requirements-dev.txt"
        raise InputError(f"this needs the datasets library: {install}") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    parts = []
    for place in places:
        name, _, files = place.replace("st:", f"{ST}:").partition(":")
        arguments, options = ["text"] if files else name.split(), {"split": "train"}
        if Path(place).is_file():
            arguments, more = loader_of(place)
            options |= {"data_files": glob.escape(str(Path(place).resolve())), **more}
        elif files:
            options |= {"data_files": f"hf://datasets/{name}/{files}", "encoding": "utf-8-sig"}
        is_json = arguments == ["text"] and "sample_by" not in options
        try:
            if Path(place).is_file() or not limit:
                rows = datasets.load_dataset(*arguments, **options)
            else:
                rows = datasets.load_dataset(*arguments, streaming=True, **options).take(limit)
                rows = datasets.Dataset.from_list(list(rows))
            parts.append(rows.rename_column("text", JSON_LINE) if is_json else rows)
        except Exception as error:  # files, the network and the hub fail in many ways
            reason = str(error.__cause__ or error).strip().split("\n")[0][:200]
            raise InputError(f"{place} cannot be read: {reason}") from None
    rows = datasets.concatenate_datasets(parts)
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def loader_of(path):
    """The arguments of datasets.load_dataset for a file."""
    from datasets import Features, Value

    suffix, encoding = SUFFIX.search(path)[1], {"encoding": "utf-8-sig"}
    if suffix == "parquet":
        return ["parquet"], {}
    if suffix not in ("csv", "tsv"):
        return ["text"], encoding | ({"sample_by": "paragraph"} if suffix == "txt" else {})
    separator = "," if suffix == "csv" else "\t"
    header = next(csv.reader((line for _, line in read_lines(path)), delimiter=separator), [])
    strings = Features({name: Value("string") for name in header})
    return ["csv"], encoding | {"sep": separator, "features": strings, "keep_default_na": False}


def values_in(batch):
    """The rows of a batch as objects. A line that is not JSON becomes None."""
    for row in zip(*batch.values(), strict=True):
        value = dict(zip(batch, row, strict=True))
        if value.get(JSON_LINE) is not None:
            try:
                value = json.loads(value[JSON_LINE])
            except (ValueError, RecursionError):
                value = None
        yield value


def pairs_in(value, source):
    """A list of (query, document, negatives) that a row gives, and why it has a fault, or "". With
    stage 1, the query is a placeholder.

    Forms: an object with the columns of the source, where an object may have several documents;
    [query, document, negative ...]; {"set": [...]} of texts that say the same."""
    query, negatives = "-", []
    if source.stage == 1:
        if not isinstance(value, dict):
            return [], "not a JSON object"
        documents = value.get("text")
    elif isinstance(value, dict) and not isinstance(value.get("set"), list):
        named = next((c for c in source.columns if set(c[:2]) <= set(value)), source.columns[0])
        query, documents, negatives = (value.get(name) for name in (*named, None)[:3])
    elif isinstance(value, (dict, list)):
        texts = value if isinstance(value, list) else value["set"][:2]
        query, documents, negatives = (*texts[:2], None, None)[:2] + (texts[2:],)
    else:
        return [], "not a JSON object"
    documents = documents if isinstance(documents, list) else [documents]
    negatives = negatives if isinstance(negatives, list) else [negatives] if negatives else []
    texts = [query, *documents, *negatives]
    if query is None or not documents or None in documents:
        return [], f"no {'query' if query is None else 'document'}"
    if set(map(type, texts)) != {str}:
        return [], "not text"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return [], "not valid Unicode"
    fault = CUT if source.stage > 1 and max(map(len, texts)) > LONGEST else ""
    if fault:
        texts = [text[:LONGEST] for text in texts]
    query, *texts = map(str.strip, texts)
    documents, negatives = texts[: len(documents)], list(filter(None, texts[len(documents) :]))
    if not query or "" in documents:
        return [], f"empty {'document' if query else 'query'}"
    return [(query, document, negatives) for document in documents], fault


# ------------------------------------------------------------------------------------------------
# Holding out


def text_split(document):
    """The split of a document of stage 1: of a hundred, one is dev and one is test."""
    return prepare.split_of(document[:1000], 1, 1)


def hold_out(source, rows, options, folder):
    """Writes the retrieval task of a source. Returns (training text of the sample, held-out
    queries, split -> held-out documents)."""
    answers, characters = {}, 0  # query -> its documents
    sample = rows.select(range(min(SAMPLE, len(rows))))
    value, fault = None, "no row"
    for value in itertools.chain.from_iterable(map(values_in, sample.iter(1000))):
        pairs, fault = pairs_in(value, source)
        for query, document, _ in pairs:
            answers.setdefault(query if source.stage > 1 else document, []).append(document)
            characters += len(query) + len(document)
        if characters > 50_000_000:
            break
    if not answers:
        raise InputError(f"{source.name}: {fault} in {str(value)[:60]}; --columns= names columns")
    if source.stage == 1:
        texts = {"train": [], "dev": [], "test": []}
        for text in answers:
            texts[text_split(text)].append(text)
        return texts["train"], [], {s: texts[s][: options.queries] for s in ("dev", "test")}

    def order(query):  # queries of one document stay together
        return hashlib.blake2b(answers[query][0].encode(), digest_size=8).digest()

    count = min(options.queries, len(answers) // 10)
    chosen = sorted(answers, key=order)[: count if count > 1 else 0]
    kept = [query for query in answers if query not in set(chosen)]
    training = itertools.chain.from_iterable((query, *answers[query]) for query in kept)
    if not chosen:
        print(f"{source.name}: too few queries to hold some out, 20 are needed")
        return training, [], {}
    names, queries, texts = {}, {"dev": [], "test": []}, {"dev": [], "test": []}
    for i, query in enumerate(chosen):
        split = "dev" if i < max(1, 2 * count // 5) else "test"
        found = [names.setdefault(document, f"d{len(names)}") for document in answers[query]]
        queries[split].append((query, found))
        texts[split] += answers[query]
    for document in itertools.chain.from_iterable(answers[query] for query in kept):
        if len(names) >= options.pool:
            break
        names.setdefault(document, f"d{len(names)}")
    documents = {name: document for document, name in names.items()}
    task = folder / "retrieval" / source.name
    write_task(task, documents, queries, tuple(source.prefixes.values()))
    return training, chosen, texts


# ------------------------------------------------------------------------------------------------
# Tokenising, in several processes


@functools.lru_cache(maxsize=1)
def open_job(path):
    source, tokenizer, held_out, queries = pickle.loads(Path(path).read_bytes())
    gc.freeze()  # so that the garbage collector does not search all of this again and again
    return source, Tokenizer.from_str(tokenizer), held_out, queries


def encode_rows(batch, numbers, job):
    """A batch of rows -> what is written, with ids as bytes, so that nothing is converted twice. Of
    a row with a fault, other than CUT, only the fault is used."""
    source, tokenizer, held_out, queries = open_job(job)
    rows, out = [], []  # rows: (number, fault, query, document, negatives)
    for number, value in zip(numbers, values_in(batch), strict=True):
        pairs, fault = pairs_in(value, source)
        rows += [(number, fault, *pair) for pair in pairs]
        out += [] if pairs else [(number, fault, b"", b"", [], 0, 0, "")]
    if rows:
        _, _, asked, documents, negatives = zip(*rows, strict=True)
        counts = np.array(list(map(len, negatives)))
        texts = {"query": asked, "document": documents}
        texts["negative"] = list(itertools.chain.from_iterable(negatives))
        columns = {name: prepare.encode(tokenizer, found) for name, found in texts.items() if found}
        held, ids, hashes = held_out.find_rows(columns, counts), {"negative": []}, {}
        for name, (flat, lengths) in columns.items():
            ends = np.cumsum(lengths)
            spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
            ids[name] = [flat[start:end].tobytes() for start, end in spans]
            hashes[name] = prepare.span_hashes(flat, ends - lengths, ends)
        pair_keys = hashes["query"] * np.uint64(prepare.HASH_BASE) + hashes["document"]
        keys = zip(pair_keys.view(np.int64), hashes["document"].view(np.int64), strict=True)
        own = iter(ids["negative"])
        for i, (row, row_keys) in enumerate(zip(rows, keys, strict=True)):
            number, fault, query, document, negatives = row
            line = {"query": query, "document": document}
            line |= {"negatives": negatives} if negatives else {}
            aside = query in queries if source.stage > 1 else text_split(document) != "train"
            fault = HELD_OUT if aside else prepare.REASONS[held[i]] or fault
            stored = ids["query"][i], ids["document"][i], list(itertools.islice(own, counts[i]))
            out.append((number, fault, *stored, *row_keys, prepare.json_line(line)))
    return dict(zip(FEATURES, map(list, zip(*out, strict=True)), strict=True))


FEATURES = {"number": "int64", "fault": "string", "query": "binary", "document": "binary"}
FEATURES |= {"negative": "binary", "key": "int64", "document_key": "int64", "line": "string"}


def encode_all(rows, job, processes):
    """All rows of a source, encoded. The `datasets` library caches them under a fingerprint of
    everything that decides the result."""
    from datasets import Features, List, Value

    made_of = [Path(path).read_bytes() for path in (job, __file__, prepare.__file__)]
    made_of.append(rows._fingerprint.encode())  # of the files
    features = {name: Value(kind) for name, kind in FEATURES.items()}
    features["negative"] = List(Value("binary"))
    processes = max(1, min(processes, len(rows) // 1000))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes == 1 else "false"
    return rows.map(
        functools.partial(encode_rows, job=job),
        batched=True,
        with_indices=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=rows.column_names,
        features=Features(features),
        new_fingerprint=hashlib.sha256(b"".join(made_of)).hexdigest()[:32],
    )


def first_rows(keys, usable):
    """Which usable rows have a key that no usable row before has."""
    rows, first = np.flatnonzero(usable), np.zeros(len(keys), bool)
    first[rows[np.unique(keys[rows], return_index=True)[1]]] = True
    return first


def choose_rows(encoded, source, seen):
    """Prints the first row with each fault. Returns (which rows to keep, which of these have a new
    document, the keys of `seen` and new documents, Counter of faults)."""
    keys, document_keys, usable, faults = [], [], [], Counter()
    for batch in encoded.remove_columns(["query", "document", "negative", "line"]).iter(100_000):
        keys.append(np.array(batch["key"]))
        document_keys.append(np.array(batch["document_key"]))
        usable.append(np.array([fault in ("", CUT) for fault in batch["fault"]]))
        for fault, number in zip(batch["fault"], batch["number"], strict=True):
            if fault and fault not in (*faults, HELD_OUT):
                print(f"  {', '.join(source.places)}, row {number + 1}: {fault}")
            faults[fault] += 1
    keys, document_keys, usable = map(np.concatenate, (keys, document_keys, usable))
    keep = first_rows(keys, usable)
    faults["copy of another row"] = int(usable.sum() - keep.sum())
    faults = Counter({f: n for f, n in faults.items() if n and f not in ("", HELD_OUT)})
    new = first_rows(document_keys, keep & ~np.isin(document_keys, seen))
    return keep, new, np.concatenate([np.array(seen, np.int64), document_keys[new]]), faults


def write_pairs(folder, source, rows, tokenizer, held_out, queries, processes, text=None, seen=()):
    """Writes a source, and appends its new documents to `text`, the SourceWriter of stage 1.

    rows: a datasets.Dataset; queries: those that are held out; seen: keys of the documents in
    `text`. Returns the number of rows, `seen` with the new keys, and a Counter of faults."""
    with tempfile.TemporaryDirectory() as temporary:
        job = Path(temporary, "job")
        aside = dict.fromkeys(queries)
        job.write_bytes(pickle.dumps((source, tokenizer.to_str(), held_out, aside)))
        encoded = encode_all(rows, str(job), processes)
    keep, new, seen, faults = choose_rows(encoded, source, seen)
    prefixes = source.prefixes if source.stage > 1 else {}
    writer, start = prepare.SourceWriter(folder, prefixes, tokenizer), 0
    dtype = np.dtype(prepare.id_type(tokenizer))
    for batch in encoded.iter(prepare.BATCH):
        rows = slice(start, start + len(batch["line"]))
        counts, columns = np.array(list(map(len, batch["negative"]))), {}
        batch["negative"] = list(itertools.chain.from_iterable(batch["negative"]))
        for name in ("query", "document", "negative") if prefixes else ("document",):
            lengths = np.array(list(map(len, batch[name])), np.int64) // dtype.itemsize
            columns[name] = np.frombuffer(b"".join(batch[name]), dtype), lengths
        writer.append(columns, batch["line"], counts, keep[rows])
        if text:
            text.append({"document": columns["document"]}, keep=new[rows])
        start = rows.stop
    shown = ", ".join(f"{n:,} {reason}" for reason, n in faults.items()) or "none"
    print(f"  {'/'.join(folder.parts[-2:]):34} {writer.rows:10,} rows; left out or cut: {shown}")
    if not writer.rows:
        raise InputError(f"{source.name}: no row is left")
    writer.finish()
    return writer.rows, seen, faults


# ------------------------------------------------------------------------------------------------
# The data folder


def make(sources, options, command):
    """Writes the data folder options.out, or adds sources to it. command: what decides the result;
    the same command is not done again."""
    began, out = time.time(), Path(options.out)
    meta = read_json(out / "meta.json") if (out / "meta.json").is_file() else {}
    if command in meta.get("commands", []):
        print(f"{out} was made by the same command: nothing to do")
        return
    names, processes = [name_of(source) for source in sources], options.processes or cores()
    check_names(names, out, meta)
    with prepare.data_folder(out) as folder:
        tokenizer = prepare.common_tokenizer(options.tokenizer, [out] if meta else [])
        tables = [load(source.places, options.limit) for source in sources]
        queries, training, texts = [], [], {"dev": {}, "test": {}}
        for source, rows in zip(sources, tables, strict=True):
            sample, chosen, aside = hold_out(source, rows, options, folder)
            queries.append(chosen)
            training += [] if tokenizer else sample
            for split in aside:
                texts[split] |= dict.fromkeys(aside[split])
        tokenizer = tokenizer or prepare.train_tokenizer(training, options.vocab_size)
        prepare.save_tokenizer(folder, tokenizer)
        new = prepare.HeldOut(prepare.held_out_texts(folder.glob("retrieval/*")), tokenizer)
        for name in ("retrieval", "stage1/dev", "stage1/test") if meta else ():
            shutil.copytree(out / name, folder / name, dirs_exist_ok=True)
        tasks = [*sorted(folder.glob("retrieval/*")), *filter(None, options.held_out.split(","))]
        held_out = prepare.HeldOut(prepare.held_out_texts(tasks), tokenizer)

        counts, reasons, text, seen = {}, {}, None, np.empty(0, np.int64)
        if not meta and "stage1/train" not in names:
            text = prepare.SourceWriter(folder / "stage1/train", {}, tokenizer)
        for name, source, rows, aside in zip(names, sources, tables, queries, strict=True):
            counts[name], seen, reasons[name] = write_pairs(
                folder / name, source, rows, tokenizer, held_out, aside, processes, text, seen
            )
        for name in meta.get("rows", {}):  # earlier sources, without what is held out now
            nothing, prefixes = {"document": []}, Source(out / name, tokenizer).meta["prefixes"]
            counts[name], removed = prepare.write_source(
                folder / name, nothing, prefixes, tokenizer, new, [out / name]
            )
            reasons[name] = Counter(meta["left out"].get(name)) + removed
        if text:
            counts["stage1/train"], _ = text.finish()
        for split in texts if not meta else ():
            column = {"document": list(texts[split])}
            prepare.write_source(folder / "stage1" / split, column, {}, tokenizer)
        corpora = sorted(folder.glob("retrieval/*/corpus.jsonl"))
        found = itertools.chain.from_iterable(read_texts(path).values() for path in corpora)
        rows = ({"_id": str(i), "text": text} for i, text in enumerate(dict.fromkeys(found)))
        write_jsonl(folder / "search" / "corpus.jsonl", rows)
        leaks = prepare.contamination(held_out, reasons)
        commands = [*meta.get("commands", []), command]
        meta = {"made_by": "nanoembed", "script": "data/pairs.py", "commands": commands}
        meta |= {"rows": counts, "left out": reasons, "contamination": leaks}
        write_json(folder / "meta.json", meta)
    print(f"  {leaks['removed']:,} training rows that repeat held-out text were left out")
    print(f"wrote {out} in {time.time() - began:.0f} s")


def name_of(source):
    """Where a source stands in its data folder."""
    return f"stage{source.stage}/{source.name}" if source.stage > 1 else "stage1/train"


def check_names(names, out, meta):
    """Raises InputError for sources that cannot be written to `out`, whose meta.json is `meta`."""
    if meta and meta.get("script") != "data/pairs.py":
        raise InputError(f"{out} was made by another script: choose another --out")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two sources are {name}: rename one of the files")
        if name in meta.get("rows", {}):
            raise InputError(f"{out} has {name} already: rename the file, or choose another --out")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------------------
# The command line


def files_of(path):
    """A file, or those of a folder."""
    files = [path]
    if Path(path).is_dir():
        files = [str(p) for p in sorted(Path(path).iterdir()) if SUFFIX.search(p.name)]
    if not files or not all(Path(file).is_file() and SUFFIX.search(file) for file in files):
        raise InputError(f"{path}: no .jsonl, .csv, .tsv or .parquet file, and no folder of some")
    return files


def prefixes_of(query, document=None):
    """Names of tasks -> prefixes. search stands for both of retrieval; none is no prefix."""
    names = ("search_query", "search_document") if query == "search" else (query, document or query)
    prefixes = ["" if name in ("", "none") else f"{name.strip(': ')}: " for name in names]
    return dict(zip(("query", "document"), prefixes, strict=True))


def source_of(argument, options):
    """The source of FILE, FILE:PREFIX, FILE:QUERY PREFIX:DOCUMENT PREFIX, or of a hub data set."""
    path, prefixes = argument, ["search"]
    if not Path(argument).exists():
        path, *given = re.split(r"(?<!^[A-Za-z]):", argument)  # C: is no prefix
        prefixes = given[:2] or prefixes
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+( [\w.-]+)?", path) and not SUFFIX.search(path)
    places = [path] if on_hub and not Path(path).exists() else files_of(path)
    columns = tuple(options.columns.split(","))
    if not 2 <= len(columns) <= 3:
        raise InputError(f"--columns={options.columns}: give two names, or three with negatives")
    name = SUFFIX.sub("", Path(path).resolve().name)
    return Pairs(name, int(options.stage or 2), prefixes_of(*prefixes), places, [columns])


def paper_table():
    rows = (line for _, line in read_lines(Path(__file__).with_name("paper.tsv")))
    return list(csv.DictReader((line for line in rows if line[:1] != "#"), delimiter="\t"))


def paper_sources(options):
    """The chosen sources of the paper, those of stage 1 as one. A local copy comes first."""
    stages, wanted = (set(filter(None, x.split(","))) for x in (options.stage, options.sources))
    table = [row for row in paper_table() if row["stage"] in (stages or "123")]
    if unknown := wanted - {row["name"] for row in table}:
        raise InputError(f"--sources: {min(unknown)} is not in the table: see --paper --list")
    if options.local and not Path(options.local).is_dir():
        raise InputError(f"--local={options.local}: there is no such folder")
    sources, text, missing = [], [], []
    found = sorted(Path(options.local).iterdir()) if options.local else []
    copies = {SUFFIX.sub("", path.name): path for path in found}
    for row in table:
        if wanted and row["name"] not in wanted:
            continue
        copy = copies.get(row["name"]) or copies.get(row["bucket"])
        places = files_of(str(copy)) if copy else [row["public"].lstrip("?")]
        if not places[0] or (options.local and not wanted and not copy):
            missing.append(row["name"])
        elif row["stage"] == "1":
            text += places
        else:
            columns = [PUBLISHED, tuple(row["columns"].split(","))]
            prefixes = prefixes_of(row["prefix"])
            sources.append(Pairs(row["name"], int(row["stage"]), prefixes, places, columns))
    if missing:
        print(f"no copy to read of {', '.join(missing)}; --local=DIR takes one of yours")
    return sources, text


def main(arguments):
    files, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    if options.list:
        for row in paper_table():
            public = row["public"] or "no public copy"
            print(f"{row['stage']}  {row['name']:32}{row['prefix']:15}{row['pairs']:>9}  {public}")
        return
    if options.paper and files:
        raise InputError(f"{files[0]} and --paper: give files, or --paper")
    if options.paper:
        sources, text = paper_sources(options)
    elif options.stage not in ("", "2", "3"):
        raise InputError(f"--stage={options.stage}: give 2, weak pairs, or 3, supervised ones")
    else:
        sources, text = [source_of(argument, options) for argument in files], []
    text += [file for path in options.text.split(",") if path for file in files_of(path)]
    sources += [Pairs("text", 1, {}, text, [("text",)])] if text else []
    if not sources:
        raise InputError("no sources: python data/pairs.py FILES, or --paper")
    command = {"files": files, **asdict(options)}
    for name in ("processes", "show", "list"):  # these do not change what is written
        del command[name]
    make(sources, options, command)
    if options.show:
        prepare.show_pairs(options.out, options.show)


if __name__ == "__main__":
    cli(main)
