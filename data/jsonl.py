"""JSON lines -> a data folder: pairs of your own, or the paper's in their published form.

    {"query": "...", "document": "...", "negatives": ["...", "..."]}       negatives may be missing

    python data/jsonl.py faq.jsonl tickets.jsonl.gz         # two sources of stage 2, in out/jsonl
    python data/jsonl.py labelled.jsonl --stage=3           # and one of stage 3 in the same folder
    python data/jsonl.py papers.jsonl.gz:clustering         # with the task prefix of both sides
    python data/jsonl.py faq.jsonl:search_query:search_document      # or of each, the default
    python data/jsonl.py news.jsonl --columns=title,text --text=notes.txt,wiki.jsonl.gz
    python mlm.py --data=out/jsonl

A file is a source, and so is a folder of files. Each source gives training rows and, from its first
hundred thousand, up to 1,000 held-out queries: a retrieval task of its name. The documents are
stage 1's text, unless --text names files. Rows that are faulty are counted by reason, the first of
each shown, and left out; with --strict they are errors.

The first call decides the tokenizer, and what stage 1 reads; later ones add sources. What a later
source holds out is taken from the earlier ones.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.pairs import prepare
from data.prepare import show_pairs
from data.rows import Pairs
from options import InputError, read_options, run
from retrieval import read_lines

SEARCH = ("search_query: ", "search_document: ")
SUFFIX = re.compile(r"\.(jsonl?|ndjson|txt|parquet)(\.gz)?$")


@dataclass
class Options:
    out: str = "out/jsonl"  # the data folder to write, or to add sources to
    stage: int = 2  # what the pairs are for: 2, weak pairs, or 3, supervised ones
    columns: str = "query,document,negatives"  # the names of query, document and negatives
    text: str = ""  # text for stage 1: plain, or JSON lines with "text"; commas between files
    tokenizer: str = ""  # a tokenizer.json to use; empty: the one in OUT, or one trained here
    vocab_size: int = 8192  # of the tokenizer that is trained
    queries: int = 1000  # held-out queries of each source, at most
    pool: int = 10_000  # documents that a retrieval task searches, at most
    held_out: str = ""  # further tasks in the BEIR layout that must not be trained on, with commas
    limit: int = 0  # rows of each source; 0: all
    longest: int = 20_000  # characters of a pair's texts; the rest is cut off and counted
    strict: bool = False  # a row that is faulty, a copy or too long is an error
    processes: int = 0  # that tokenise; 0: as many as cores
    show: int = 0  # prints so many pairs, drawn at random from all sources


def json_rows(paths):
    """(where, value) of every line of the files; value is None where it is no JSON."""
    for path in paths:
        for number, line in read_lines(path):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                yield f"{path}, line {number}", value


def text_rows(path):
    """Documents of a file: JSON lines with "text", or paragraphs of plain text."""
    if ".json" in path.name:
        return (
            (w, v["text"] if isinstance(v, dict) and "text" in v else v)
            for w, v in json_rows([path])
        )
    return paragraphs(path)


def paragraphs(path):
    """Plain text, a paragraph at a time."""
    lines = []
    for number, line in read_lines(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield f"{path}, line {number}", ["\n".join(lines)]
            lines = []
    if lines:
        yield f"{path}, at its end", ["\n".join(lines)]


def prefix(name):
    """clustering -> "clustering: "; empty or none: no prefix."""
    return "" if name in ("", "none") else name.removesuffix(": ").removesuffix(":") + ": "


def files_of(path):
    """A file, or those of a folder. Raises InputError where there is none."""
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if SUFFIX.search(p.name)]
        if not found:
            raise InputError(f"{path} has no file of JSON lines")
        return found
    if not path.is_file():
        raise InputError(f"{path}: there is no such file or folder")
    return [path]


def source_of(argument, options):
    """FILE, FILE:PREFIX or FILE:QUERY PREFIX:DOCUMENT PREFIX."""
    path, *names = [argument] if Path(argument).exists() else argument.split(":")
    prefixes = (*map(prefix, names), *map(prefix, names[:1]))[:2] if names else SEARCH
    files = files_of(Path(path))
    name = SUFFIX.sub("", Path(path).resolve().name)
    columns = tuple(options.columns.split(","))
    if not 2 <= len(columns) <= 3:
        raise InputError(f"--columns={options.columns}: give two names, or three with negatives")
    return Pairs(name, options.stage, prefixes, lambda: json_rows(files), columns, files)


def text_source(options):
    """--text as a source of documents."""
    files = [file for name in options.text.split(",") for file in files_of(Path(name))]

    def read():
        for path in files:
            for where, value in text_rows(path):
                yield where, [value] if isinstance(value, str) else value

    return Pairs("text", 1, ("", ""), read, ("text",), files)


def main(arguments):
    files = [argument for argument in arguments if not argument.startswith("--")]
    options, _ = read_options(Options, [a for a in arguments if a.startswith("--")])
    if options.stage not in (2, 3):
        raise InputError(f"--stage={options.stage}: give 2, weak pairs, or 3, supervised ones")
    if not files:
        raise InputError("no files given: python data/jsonl.py FILES")
    sources = [source_of(argument, options) for argument in files]
    if options.text:
        sources.append(text_source(options))
    command = {"script": "data/jsonl.py", "files": files, **asdict(options)}
    out = prepare(sources, options, {k: v for k, v in command.items() if k not in UNIMPORTANT})
    if options.show:
        show_pairs(out, options.show)


UNIMPORTANT = ("processes", "show", "strict")  # they do not change what is written


if __name__ == "__main__":
    run(main)
