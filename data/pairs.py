"""JSON lines, CSV, Parquet or data sets of the hub -> a data folder; the paper's data too.

    {"query": "...", "document": "...", "negatives": ["...", "..."]}       negatives may be missing

    python data/pairs.py faq.jsonl tickets.csv              # two sources of stage 2, in out/pairs
    python data/pairs.py faq.jsonl --stage3=labelled.jsonl  # weak pairs, and supervised ones
    python data/pairs.py papers.jsonl.gz:clustering         # with the task prefix of both sides
    python data/pairs.py faq.jsonl:search_query:search_document         # or of each, the default
    python data/pairs.py titles.jsonl --columns=set         # a list of texts that say the same
    python data/pairs.py news.jsonl --columns=title,body --text=wiki.jsonl.gz
    python data/pairs.py --sources=squad,eli5 --limit=10000     # of the paper's, from the hub

A file is a source (`cat` joins gzipped shards). Its first 10,000 rows give up to --queries held-out
queries: a retrieval task of its name. The documents are the text of stage 1, unless --text names
files. Faulty rows are left out and counted by reason. Parquet and the hub are read with the
`datasets` library. data/paper.tsv lists the paper's sources. This was never run against the hub
itself, only on local files of each form.
"""

import csv
import itertools
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import find_checkpoint
from common.files import fingerprint, load_tokenizer, read_lines, write_json
from common.options import InputError, cli, read_options, split_words
from data import prepare
from data.duplicates import HeldOut, contamination, held_out_texts
from data.tasks import read_texts, write_jsonl, write_task
from data.tokenizer import save_tokenizer, train_tokenizer

SAMPLE = 10_000  # rows of a source that its retrieval task and the tokenizer are made from
COLUMNS = ["query", "document", "negatives"]
TASKS = "search_query|search_document|classification|clustering|none"  # prefixes; none is no prefix
SURROGATE = re.compile("[\ud800-\udfff]")
SUFFIX = re.compile(r"\.(jsonl?|csv|parquet)(\.gz)?$", re.I)


@dataclass
class Options:
    out: str = "out/pairs"  # the data folder to write
    stage3: str = ""  # sources of stage 3, FILE or FILE:PREFIX, separated by commas
    columns: str = "query,document,negatives"  # their names, or of one column with a list of texts
    text: str = ""  # text for stage 1: files with a column "text", separated by commas
    tokenizer: str = ""  # a tokenizer.json to use; default: a new one
    vocab_size: int = 8192  # of the new tokenizer; the paper has 30,522 [300, 1000000]
    queries: int = 1000  # held-out queries of each source, at most [0, 1000000]
    held_out: str = ""  # further retrieval tasks that must not be trained on, with commas
    limit: int = 0  # rows of each source; 0: all [0, 1e12]
    show: int = 0  # how many pairs to print, drawn at random from all sources [0, 1000]
    paper: bool = False  # read the sources of data/paper.tsv
    sources: str = ""  # some of data/paper.tsv, with commas; default with --paper: all


@dataclass
class Pairs:
    """A source that is not read yet."""

    name: str
    stage: int  # 2 or 3; 1: documents alone
    prefixes: dict  # of query and document
    places: list  # files, here or on the hub (hf://...), or data sets of the hub: "NAME CONFIG"
    columns: list  # names of query, document and negatives


# ------------------------------------------------------------------------------------------------
# Reading


def read_pairs(source, limit, faults):
    """Yields a row of text (prepare.write_source) for each pair in the first `limit` rows of a
    source; 0: in all. Faulty rows are counted. faults: reason -> [number, the first of them]."""
    rows = itertools.chain.from_iterable(map(read_place, source.places))
    for number, row in enumerate(itertools.islice(rows, limit or None), start=1):
        try:
            yield from pairs_in(row, source)
        except ValueError as fault:
            first = f"row {number}: {str(row)[:60].strip()}"
            faults.setdefault(str(fault), [0, first])[0] += 1


def read_place(place):
    """The rows of a file or a data set: objects, or lines of JSON that are still to be parsed."""
    suffix = SUFFIX.search(place.lower())
    if not Path(place).is_file() or suffix[1] == "parquet":
        return read_dataset(place, suffix)
    lines = (line for _, line in read_lines(place))
    if suffix[1] == "csv":
        csv.field_size_limit(2**31 - 1)
        return csv.DictReader(f"{line}\n" for line in lines)
    return filter(str.strip, lines)


def read_dataset(place, suffix):
    """Parquet, and what is on the hub; no more is downloaded than is read."""
    try:
        import datasets

        names, how = place.split(), {"split": "train", "streaming": True}
        if suffix:  # lines of JSON are read as text, since they may be lists
            names, how["data_files"] = ["parquet" if suffix[1] == "parquet" else "text"], place
        rows = datasets.load_dataset(*names, **how)
        yield from (row["text"] for row in rows) if names == ["text"] else rows
    except Exception as error:  # not installed; files, the network and the hub fail in many ways
        reason = str(error.__cause__ or error).strip().split("\n")[0][:200]
        raise InputError(f"{place} cannot be read: {reason}") from None


def pairs_in(row, source):
    """The pairs of a row, as dicts. Raises ValueError(fault) for a row that has none.

    Forms: an object with the columns of the source, which may have several documents; if the source
    has one column, a list of texts there that say the same; [query, document, negative ...]."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        if None in row:  # csv.DictReader's name for what is left over
            raise ValueError("more fields than the header")
        values = [row.get(name) for name in source.columns]
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0][:2]
    elif isinstance(row, list):
        values = [*(*row, None, None)[:2], row[2:]]
    else:
        raise ValueError("not a JSON object")
    query, documents, negatives = (*values, None, None, None)[:3]
    documents, negatives = (x if isinstance(x, list) else [x] for x in (documents, negatives))
    texts = [query, *documents, *negatives]
    if not {type(text) for text in texts} <= {str, type(None)}:
        raise ValueError("not text")
    if SURROGATE.search("".join(filter(None, texts))):
        raise ValueError("not valid Unicode")
    query, *texts = ((text or "").strip() for text in texts)
    documents, negatives = texts[: len(documents)], list(filter(None, texts[len(documents) :]))
    if not query or not documents or "" in documents:
        raise ValueError(f"no {source.columns[:2][-1] if query else source.columns[0]}")
    return [dict(zip(COLUMNS, (query, text, negatives), strict=True)) for text in documents]


def hold_out(source, options, folder):
    """Writes the retrieval task of a source of pairs. Returns (training text of its first rows,
    held-out queries, split -> held-out documents)."""
    answers, faults = {}, {}  # query -> its documents
    for pair in read_pairs(source, min(SAMPLE, options.limit or SAMPLE), faults):
        answers.setdefault(pair["query"], []).append(pair["document"])
    if not answers:
        reasons = "; ".join(f"{fault} in {first}" for fault, (_, first) in faults.items())
        columns = ", ".join(dict.fromkeys(source.columns))
        raise InputError(f"{source.name}: {reasons or 'no rows'}; give {columns}, or --columns")

    def documents_of(queries):
        return [document for query in queries for document in answers[query]]

    # in random order, but queries of one document stay together
    queries = sorted(answers, key=lambda query: fingerprint(answers[query][0].encode()))
    count = min(options.queries, len(answers) // 10)
    if count < 2:
        count, most = 0, f"--queries={options.queries}, and a tenth of all {len(answers):,}"
        print(f"{source.name}: no held-out queries: 2 are needed; the most are {most}")
    splits = {"dev": queries[: round(0.4 * count)], "test": queries[round(0.4 * count) : count]}
    if source.stage > 1 and count:
        names = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(documents_of(queries)))}
        corpus, judged = {name: text for text, name in names.items()}, {}
        for split, some in splits.items():
            judged[split] = [(query, [names[text] for text in answers[query]]) for query in some]
        write_task(folder / "retrieval" / source.name, corpus, judged, source.prefixes)
    training = itertools.chain(queries[count:], documents_of(queries[count:]))
    return training, set(queries[:count]), {s: documents_of(splits[s]) for s in splits}


def write_pairs(folder, source, limit, tokenizer, held_out, queries):
    """Writes a source without its held-out queries, rows that repeat held-out text, and copies of
    earlier rows. Returns the number of rows, and reason -> how many were left out."""
    faults = {}
    pairs = (pair for pair in read_pairs(source, limit, faults) if pair["query"] not in queries)
    rows, left_out = prepare.write_source(
        folder, pairs, source.prefixes, tokenizer, held_out, distinct=True
    )
    left_out |= {fault: count for fault, (count, _) in faults.items()}
    if not rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise InputError(f"{source.name}: no row is left: {reasons or 'all are held out'}")
    print(f"  {'/'.join(folder.parts[-2:]):34} {rows:10,} rows")
    for reason, count in left_out.items():
        first = f", the first in {faults[reason][1]}" if reason in faults else ""
        print(f"    left out: {count:,} {reason}{first}")
    return rows, left_out


def make(sources, options, inputs):
    """Writes the data folder options.out. inputs: what decides its content."""
    if prepare.is_made(options.out, inputs):
        return
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"two sources have one name, rename a file: {', '.join(names)}")
    where = options.tokenizer
    tokenizer = load_tokenizer(find_checkpoint(where)) if where else None
    with prepare.data_folder(options.out) as folder:
        queries, training, texts = {}, [], {"dev": {}, "test": {}}
        for source in sources:
            sample, queries[source.name], documents = hold_out(source, options, folder)
            training += [] if tokenizer else sample
            for split in texts:
                texts[split] |= dict.fromkeys(documents[split])
        tokenizer = tokenizer or train_tokenizer(training, options.vocab_size)
        save_tokenizer(folder, tokenizer)
        tasks = [*sorted(folder.glob("retrieval/*")), *filter(None, options.held_out.split(","))]
        held_out, counts, left_out = HeldOut(held_out_texts(tasks), tokenizer), {}, {}
        for source in sources:
            name = f"stage{source.stage}/{source.name if source.stage > 1 else 'train'}"
            counts[name], left_out[name] = write_pairs(
                folder / name, source, options.limit, tokenizer, held_out, queries[source.name]
            )
        if (name := "stage1/train") not in counts:
            stored = [folder / source for source in counts]
            counts[name], _ = prepare.write_source(
                folder / name, (), {}, tokenizer, stored=stored, distinct=True
            )
        for split in texts:
            column = ({"document": text} for text in texts[split])
            prepare.write_source(folder / "stage1" / split, column, {}, tokenizer)
        corpus = {}
        for path in sorted(folder.glob("retrieval/*/corpus.jsonl")):
            corpus |= dict.fromkeys(read_texts(path).values())
        rows = ({"_id": str(i), "text": text} for i, text in enumerate(corpus))
        write_jsonl(folder / "search" / "corpus.jsonl", rows)
        prepare.check_unknown(folder, counts)
        meta = {"made_by": "nanoembed", "inputs": inputs, "rows": counts, "left out": left_out}
        meta["contamination"] = contamination(held_out, left_out)
        write_json(folder / "meta.json", meta)


# ------------------------------------------------------------------------------------------------
# The command line


def source_of(argument, stage, columns):
    """The source of PATH, PATH:PREFIX or PATH:QUERY PREFIX:DOCUMENT PREFIX, with hub names too."""
    path, *tasks = re.fullmatch(rf"(.*?)(?::({TASKS}))?(?::({TASKS}))?", argument, re.S).groups()
    tasks = list(filter(None, tasks)) or ["search_query", "search_document"]
    if SUFFIX.search(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+( [\w.-]+)?", path):  # no hub name
        check_file(path)
    name = SUFFIX.sub("", Path(path).resolve().name)
    return Pairs(name, stage, prefixes_of(tasks), [path], columns)


def check_file(path):
    if not Path(path).is_file() or not SUFFIX.search(path):
        names = ".jsonl, .csv or .parquet file; prefixes are " + TASKS.replace("|", ", ")
        raise InputError(f"{path}: there is no such {names}")


def prefixes_of(tasks):
    """[task of queries, task of documents] or [task of both] -> prefixes. none is no prefix."""
    prefixes = ["" if task == "none" else f"{task}: " for task in (tasks[0], tasks[-1])]
    return dict(zip(COLUMNS, prefixes, strict=False))


def paper_table():
    lines = [line for _, line in read_lines(Path(__file__).with_name("paper.tsv"))]
    return list(csv.DictReader((line for line in lines if line[:1] != "#"), delimiter="\t"))


def paper_sources(names):
    """The sources of the paper with these names, or all, and the places of the text of stage 1."""
    table, sources, text = {row["name"]: row for row in paper_table()}, [], []
    if unknown := set(names) - set(table):
        raise InputError(f"--sources: {min(unknown)} is not in data/paper.tsv")
    for name in names or table:
        row, place = table[name], table[name]["public"].lstrip("?")
        if not place:
            print(f"{name} has no public copy: give yours as a file")
        elif row["stage"] == "1":
            text.append(place)
        else:
            prefixes, columns = prefixes_of(row["prefix"].split(":")), row["columns"].split(",")
            sources.append(Pairs(name, int(row["stage"]), prefixes, [place], columns))
    return sources, text


def main(arguments):
    files, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    lists = options.sources, options.stage3, options.text, options.columns
    names, stage3, text, columns = ([*filter(None, names.split(","))] for names in lists)
    if not 1 <= len(columns) <= 3:
        raise InputError(f"--columns={options.columns}: give two names, or three with negatives")
    sources, places = paper_sources(names) if options.paper or names else ([], [])
    sources += [source_of(file, 2, columns) for file in files]
    sources += [source_of(file, 3, columns) for file in stage3]
    for path in text:
        check_file(path)
    places += text
    sources += [Pairs("--text", 1, {}, places, ["text", "text"])] if places else []
    if not sources:
        raise InputError("no sources: python data/pairs.py FILES, or --paper")
    inputs = {"script": "data/pairs.py", "files": files, **asdict(options)}
    del inputs["out"], inputs["show"]  # these do not change what is written
    here = [path for source in sources for path in source.places if Path(path).is_file()]
    inputs["changed"] = {path: fingerprint(path) for path in here}
    make(sources, options, inputs)
    if options.show:
        prepare.show_pairs(options.out, options.show)


if __name__ == "__main__":
    cli(main)
