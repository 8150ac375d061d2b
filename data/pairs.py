"""JSON lines, CSV, Parquet or data sets of the hub -> a data folder; the paper's data too.

    {"query": "...", "document": "...", "negatives": ["...", "..."]}       negatives may be missing

    python data/pairs.py faq.jsonl tickets.csv              # two sources of stage 2, in out/pairs
    python data/pairs.py faq.jsonl --stage3=labelled.jsonl  # weak pairs, and supervised ones
    python data/pairs.py papers.jsonl.gz:clustering         # with the task prefix of both sides
    python data/pairs.py faq.jsonl:search_query:search_document         # or of each, the default
    python data/pairs.py news.jsonl --columns=title,body --text=notes.txt,wiki.jsonl.gz
    python data/pairs.py --paper --list                     # the paper's sources, data/paper.tsv
    python data/pairs.py --paper --sources=squad,eli5 --limit=10000     # a sample, from the hub
    python data/pairs.py --paper --local=DIR                # prefers copies, as DIR/squad.jsonl.gz

A file is a source, and so is a folder of files. Its first 50,000 rows give up to --queries
held-out queries: a retrieval task of its name. The documents are the text of stage 1, unless --text
names files. Faulty rows are left out and counted by reason. Parquet and the hub are read with the
`datasets` library. This was never run against the hub itself, only on local files of each form.
"""

import collections
import csv
import glob
import hashlib
import itertools
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import fingerprint, load_tokenizer, read_lines, write_json
from common.options import InputError, cli, read_options, split_words
from data import prepare
from data.duplicates import HeldOut, contamination, held_out_texts
from data.store import encode
from data.tasks import read_texts, write_jsonl, write_task

SAMPLE = 50_000  # rows of a source from which queries are held out and the tokenizer is trained
POOL = 10_000  # documents that a retrieval task searches
SURROGATE = re.compile("[\ud800-\udfff]")
PUBLISHED = "query", "document", "negatives"  # the columns of the paper's own data
SUFFIX = re.compile(r"\.(jsonl?|ndjson|txt|csv|tsv|parquet)(\.gz)?$")


@dataclass
class Options:
    out: str = "out/pairs"  # the data folder to write
    stage3: str = ""  # sources of stage 3, FILE or FILE:PREFIX, separated by commas
    columns: str = "query,document,negatives"  # the names of query, document and negatives
    text: str = ""  # text for stage 1: files, plain or JSON lines with "text", with commas
    tokenizer: str = ""  # a tokenizer.json to use; default: a new one
    vocab_size: int = 8192  # of the new tokenizer; the paper has 30,522 [300, 1000000]
    queries: int = 1000  # held-out queries of each source, at most [0, 1000000]
    held_out: str = ""  # further retrieval tasks that must not be trained on, with commas
    limit: int = 0  # rows of each source; 0: all [0, 1e12]
    show: int = 0  # how many pairs to print, drawn at random from all sources [0, 1000]
    paper: bool = False  # read the sources of data/paper.tsv
    list: bool = False  # print the sources of data/paper.tsv, and prepare nothing
    local: str = ""  # with --paper: a folder of local copies, files or folders named as the source
    sources: str = ""  # with --paper: names, with commas; default: all that can be read


@dataclass
class Pairs:
    """A source that is not read yet."""

    name: str
    stage: int  # 2 or 3; 1: documents alone
    prefixes: dict  # of query and document
    places: list  # files, here or on the hub (hf://...), or data sets of the hub: "NAME CONFIG"
    columns: list  # names of query, document and negatives; the first that a row has count


# ------------------------------------------------------------------------------------------------
# Reading


def read_pairs(source, limit, faults):
    """Yields (query, document, negatives) of the first `limit` rows of a source; 0: of all. Rows
    that give no pair are counted. faults: reason -> [number of rows, the first of them]."""
    rows = itertools.chain.from_iterable(read_place(place, limit) for place in source.places)
    for number, row in enumerate(itertools.islice(rows, limit or None), start=1):
        pairs, fault = pairs_in(row, source)
        if fault:
            first = f"row {number}: {str(row)[:60].strip()}"
            faults.setdefault(fault, [0, first])[0] += 1
        yield from pairs


def read_place(place, limit):
    """The rows of a file or a data set: objects, or lines of JSON that are still to be parsed."""
    kind, lines = SUFFIX.search(place), (f"{line}\n" for _, line in read_lines(place))
    if not Path(place).is_file() or kind[1] == "parquet":
        return read_dataset(place, kind, limit)
    if kind[1] in ("csv", "tsv"):
        csv.field_size_limit(2**31 - 1)
        return csv.DictReader(lines, delimiter="," if kind[1] == "csv" else "\t")
    if kind[1] == "txt":
        paragraphs = itertools.groupby(lines, lambda line: bool(line.strip()))
        return ({"text": "".join(paragraph)} for has_text, paragraph in paragraphs if has_text)
    return lines


def read_dataset(place, kind, limit):
    """Parquet, and what is on the hub. With a limit, no more than that is downloaded."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{place} needs: pip install -r requirements-dev.txt") from None
    local, arguments = Path(place).is_file(), {"path": place}
    if kind:
        arguments["path"] = "parquet" if kind[1] == "parquet" else "text"
        arguments["data_files"] = glob.escape(place) if local else place
    elif " " in place:
        arguments["path"], arguments["name"] = place.split()
    try:
        rows = datasets.load_dataset(**arguments, split="train", streaming=local or limit > 0)
        yield from (row["text"] for row in rows) if arguments["path"] == "text" else rows
    except Exception as error:  # files, the network and the hub fail in many ways
        reason = str(error.__cause__ or error).strip().split("\n")[0][:200]
        raise InputError(f"{place} cannot be read: {reason}") from None


def pairs_in(row, source):
    """A list of (query, document, negatives) that a row gives, or [] and its fault.

    Forms: an object with the columns of the source, where an object may have several documents;
    [query, document, negative ...]; {"set": [...]} of texts that say the same."""
    if isinstance(row, str) and not row.strip():
        return [], ""  # a blank line
    try:
        value = json.loads(row) if isinstance(row, str) else row
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and None in value:  # csv.DictReader's name for what is left over
        return [], "more fields than the header"
    if isinstance(value, dict) and isinstance(value.get("set"), list):
        value = value["set"][:2]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [], "an array of objects, where each object needs a line of its own"
    if isinstance(value, list):
        query, documents, negatives = (*value[:2], None, None)[:2] + (value[2:],)
    elif isinstance(value, dict):
        named = next((c for c in source.columns if set(c[:2]) <= set(value)), source.columns[0])
        query, documents, negatives = (value.get(name) for name in (*named, None)[:3])
    else:
        return [], "not a JSON object"
    documents = documents if isinstance(documents, list) else [documents]
    negatives = negatives if isinstance(negatives, list) else [negatives] if negatives else []
    texts = [query, *documents, *negatives]
    if not {type(text) for text in texts} <= {str, type(None)}:
        return [], "not text"
    if SURROGATE.search("".join(filter(None, texts))):
        return [], "not valid Unicode"
    query, *texts = ((text or "").strip() for text in texts)
    documents, negatives = texts[: len(documents)], list(filter(None, texts[len(documents) :]))
    if not query or not documents or "" in documents:
        missing = "document" if query else "query"
        return [], f"no {missing if source.prefixes else 'text'}"
    return [(query, document, negatives) for document in documents], ""


# ------------------------------------------------------------------------------------------------
# Holding out


def hold_out(source, options, folder):
    """Writes the retrieval task of a source of pairs. Returns (training text of its first rows,
    held-out queries, split -> held-out documents)."""
    answers, faults = {}, {}  # query -> its documents
    for query, document, _ in read_pairs(source, min(SAMPLE, options.limit or SAMPLE), faults):
        answers.setdefault(query, []).append(document)
    if not answers:
        for fault, (_, first) in faults.items():
            hint = "--columns= names columns" if source.prefixes else 'its column is "text"'
            raise InputError(f"{source.name}: {fault} in {first}; {hint}")
        raise InputError(f"{source.name}: no rows")

    def documents_of(queries):
        return [document for query in queries for document in answers[query]]

    def order(query):  # queries of one document stay together
        return hashlib.blake2b(answers[query][0].encode(), digest_size=8).digest()

    queries, count = sorted(answers, key=order), min(options.queries, len(answers) // 10)
    if count < 2:
        if options.queries >= 2:
            print(f"{source.name}: too few queries to hold some out, 20 are needed")
        count = 0
    dev = -(-2 * count // 5)
    splits = {"dev": queries[:dev], "test": queries[dev:count]}
    if source.stage > 1 and count:
        pool = dict.fromkeys(documents_of(queries))  # begins with the answers
        size = max(POOL, len(documents_of(queries[:count])))
        corpus = {f"d{i}": text for i, text in enumerate(itertools.islice(pool, size))}
        names, asked = {text: name for name, text in corpus.items()}, {}
        for split, found in splits.items():
            asked[split] = [(query, [names[text] for text in answers[query]]) for query in found]
        prefixes = tuple(source.prefixes.values())
        write_task(folder / "retrieval" / source.name, corpus, asked, prefixes)
    training = itertools.chain(queries[count:], documents_of(queries[count:]))
    return training, queries[:count], {s: documents_of(splits[s]) for s in splits}


# ------------------------------------------------------------------------------------------------
# Writing


def write_pairs(folder, source, limit, tokenizer, held_out, queries):
    """Writes a source without its held-out queries, rows that repeat held-out text, and copies of
    earlier rows, of which it remembers some 80 bytes a row. Returns the number of rows, and
    a Counter: reason -> how many were left out."""
    writer = prepare.SourceWriter(folder, source.prefixes, tokenizer, held_out)
    faults, copies, seen = {}, 0, set()
    pairs = (pair for pair in read_pairs(source, limit, faults) if pair[0] not in queries)
    while batch := list(itertools.islice(pairs, prepare.BATCH)):
        query, document, negatives = zip(*batch, strict=True)
        texts = {"document": document}
        if source.prefixes:
            texts |= {"query": query, "negative": itertools.chain.from_iterable(negatives)}
        columns = {name: encode(tokenizer, found) for name, found in texts.items()}
        new = np.zeros(len(batch), bool)
        keys = prepare.row_keys(*(columns[name] for name in source.prefixes or texts))
        for i, key in enumerate(keys.tolist()):
            new[i] = key not in seen
            seen.add(key)
        copies += int((~new).sum())
        lines = [prepare.json_line(dict(zip(PUBLISHED, pair, strict=True))) for pair in batch]
        writer.append(columns, lines, np.array(list(map(len, negatives))), new)
    if not writer.rows:
        raise InputError(f"{source.name}: no row is left")
    rows, repeats = writer.finish()
    for fault, (count, first) in faults.items():
        print(f"  {source.name}: {count:,} {fault}, the first in {first}")
    left_out = {fault: count for fault, (count, _) in faults.items()}
    left_out = collections.Counter({**left_out, "copy of another row": copies}) + repeats
    shown = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items()) or "none"
    print(f"  {'/'.join(folder.parts[-2:]):34} {rows:10,} rows; left out: {shown}")
    return rows, left_out


def make(sources, options, inputs):
    """Writes the data folder options.out. inputs: what decides its content."""
    began, out = time.time(), Path(options.out)
    if prepare.is_made(out, inputs):
        return
    twice = [name for name, n in collections.Counter(s.name for s in sources).items() if n > 1]
    if twice:
        raise InputError(f"two sources are called {twice[0]}: rename one of the files")
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    with prepare.data_folder(out) as folder:
        queries, training, texts = {}, [], {"dev": {}, "test": {}}
        for source in sources:
            sample, queries[source.name], held_out = hold_out(source, options, folder)
            training += [] if tokenizer else sample
            for split in texts:
                texts[split] |= dict.fromkeys(held_out[split])
        tokenizer = tokenizer or prepare.train_tokenizer(training, options.vocab_size)
        prepare.save_tokenizer(folder, tokenizer)
        tasks = [*sorted(folder.glob("retrieval/*")), *filter(None, options.held_out.split(","))]
        held_out, counts, left_out = HeldOut(held_out_texts(tasks), tokenizer), {}, {}
        for source in sources:
            name = f"stage{source.stage}/{source.name if source.stage > 1 else 'train'}"
            given = (options.limit, tokenizer, held_out, set(queries[source.name]))
            counts[name], left_out[name] = write_pairs(folder / name, source, *given)
        if "stage1/train" not in counts:
            stored = [folder / name for name in counts]
            counts["stage1/train"] = prepare.write_documents(
                folder / "stage1/train", stored, tokenizer
            )
        for split in texts:
            column = {"document": list(texts[split])}
            prepare.write_source(folder / "stage1" / split, column, {}, tokenizer)
        corpora = sorted(folder.glob("retrieval/*/corpus.jsonl"))
        found = itertools.chain.from_iterable(read_texts(path).values() for path in corpora)
        rows = ({"_id": str(i), "text": text} for i, text in enumerate(dict.fromkeys(found)))
        write_jsonl(folder / "search" / "corpus.jsonl", rows)
        prepare.print_unknown(folder)
        leaks = contamination(held_out, left_out)
        meta = {"made_by": "nanoembed", "inputs": inputs, "rows": counts, "left out": left_out}
        write_json(folder / "meta.json", meta | {"contamination": leaks})
    print(f"  {leaks['removed']:,} training rows that repeat held-out text were left out")
    print(f"wrote {out} in {time.time() - began:.0f} s")


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


def prefixes_of(tasks):
    """[task of queries, task of documents] or [task of both] -> prefixes. none is no prefix."""
    query, document = ("" if task == "none" else f"{task}: " for task in (tasks[0], tasks[-1]))
    return {"query": query, "document": document}


def source_of(argument, stage, columns):
    """The source of PATH, PATH:PREFIX or PATH:QUERY PREFIX:DOCUMENT PREFIX, with hub names too."""
    path, tasks = argument, []
    if not Path(argument).exists():
        path, *tasks = re.split(r"(?<!^[A-Za-z]):", argument)  # C: is no prefix
    if len(tasks) > 2 or "" in tasks:
        raise InputError(f"{argument}: give FILE, FILE:PREFIX or FILE:QUERY PREFIX:DOCUMENT PREFIX")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+( [\w.-]+)?", path) and not SUFFIX.search(path)
    places = [path] if on_hub and not Path(path).exists() else files_of(path)
    prefixes = prefixes_of(tasks or ["search_query", "search_document"])
    return Pairs(SUFFIX.sub("", Path(path).resolve().name), stage, prefixes, places, [columns])


def paper_table():
    rows = (line for _, line in read_lines(Path(__file__).with_name("paper.tsv")))
    return list(csv.DictReader((line for line in rows if line[:1] != "#"), delimiter="\t"))


def paper_sources(names, local):
    """The sources of the paper with these names, or all; those of stage 1 as one."""
    table, sources, text = paper_table(), [], []
    if unknown := set(names) - {row["name"] for row in table}:
        raise InputError(f"--sources: {min(unknown)} is not in the table: see --paper --list")
    copies = {SUFFIX.sub("", p.name): str(p) for p in Path(local).iterdir()} if local else {}
    for row in [row for row in table if not names or row["name"] in names]:
        name, stage, public = row["name"], int(row["stage"]), row["public"].lstrip("?")
        places = files_of(copies[name]) if name in copies else [public]
        columns, prefixes = row["columns"].split(","), prefixes_of(row["prefix"].split(":"))
        if not places[0]:
            print(f"{name} has no public copy; --local=DIR takes one of yours")
        elif stage == 1:
            text += places
        else:
            sources.append(Pairs(name, stage, prefixes, places, [PUBLISHED, columns]))
    return sources, text


def main(arguments):
    files, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    if options.list:
        for row in paper_table():
            print("{stage}  {name:32}{prefix:29}{pairs:>9}  {public}".format_map(row))
        return
    names, stage3, text, columns = (
        [x for x in value.split(",") if x]
        for value in (options.sources, options.stage3, options.text, options.columns)
    )
    if options.paper and (files or stage3):
        raise InputError(f"{(files + stage3)[0]} and --paper: give files, or --paper")
    if not 2 <= len(columns) <= 3:
        raise InputError(f"--columns={options.columns}: give two names, or three with negatives")
    sources, places = paper_sources(names, options.local) if options.paper else ([], [])
    sources += [source_of(file, 2, columns) for file in files]
    sources += [source_of(file, 3, columns) for file in stage3]
    places += [file for path in text for file in files_of(path)]
    sources += [Pairs("--text", 1, {}, places, [("text", "text")])] if places else []
    if not sources:
        raise InputError("no sources: python data/pairs.py FILES, or --paper")
    inputs = {"script": "data/pairs.py", "files": files, **asdict(options)}
    for name in ("out", "show", "list"):  # these do not change what is written
        del inputs[name]
    here = [Path(p) for source in sources for p in source.places if Path(p).is_file()]
    inputs["changed"] = {str(path): fingerprint(path) for path in here}
    make(sources, options, inputs)
    if options.show:
        prepare.show_pairs(options.out, options.show)


if __name__ == "__main__":
    cli(main)
