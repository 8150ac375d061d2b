"""Retrieval tasks on disk, in the layout of BEIR (arXiv 2104.08663).

Each file is plain or gzipped:

    corpus.jsonl     {"_id": "d1", "title": "may be missing", "text": "..."}
    queries.jsonl    {"_id": "q1", "text": "..."}
    qrels/test.tsv   query-id, corpus-id, score: tab-separated, below a header
    meta.json        {"prefixes": {"query": "search_query: ", "document": ...}}; may be missing
"""

import json
import re
from pathlib import Path

from common.files import read_json, read_json_lines, read_lines, write_json, write_text
from common.options import InputError
from data.prefixes import PREFIXES

# A whole number of up to three digits, as any program may print it: 1, 2.0, -1, 1.000e+00
GRADE = re.compile(r"\s*[+-]?\d{1,3}(\.0*)?([eE][+-]?0+)?\s*")


def read_rows(path):
    """(line number, id, text) of each line of a corpus.jsonl or queries.jsonl; a title comes before
    its text [code]. Raises InputError for an empty file, or a line without id or text."""
    number = 0
    for number, row in read_json_lines(path):
        name, title, text = row.get("_id"), row.get("title") or "", row.get("text")
        if type(name) not in (str, int) or not isinstance(title, str) or not isinstance(text, str):
            raise InputError(f'{path}, line {number}: not {{"_id": ..., "text": "..."}}')
        yield number, str(name), f"{title} {text}".strip()
    if not number:
        raise InputError(f'{path} is empty: a text is a line {{"_id": ..., "text": "..."}}')


def read_texts(path):
    """id -> text. Raises InputError as read_rows does, and for an id that is there twice."""
    texts = {}
    for number, name, text in read_rows(path):
        if name in texts:
            raise InputError(f"{path}, line {number}: the _id {name} is there twice")
        texts[name] = text
    return texts


def read_judgements(path, queries, documents):
    """query id -> document id -> grade above 0, of a qrels file.

    Raises InputError for a line of another form, or one that names an unknown id."""
    judged = {}
    for number, line in read_lines(path):
        where, columns = f"{path}, line {number}", line.split("\t")
        if not line.strip() or (not judged and columns[-1].strip() == "score"):
            continue
        if len(columns) != 3:
            raise InputError(f"{where}: not query-id, corpus-id and score, separated by tabs")
        query, document, grade = columns
        if not GRADE.fullmatch(grade):
            raise InputError(f"{where}: the grade {grade} is no whole number from -999 to 999")
        for name, key, texts in (("queries", query, queries), ("corpus", document, documents)):
            if key not in texts:
                raise InputError(f"{where}: {key} is not in {name}.jsonl")
        if float(grade) > 0:
            judged.setdefault(query, {})[document] = int(float(grade))
    return judged


def splits_of(folder):
    """The names of a task's qrels files, plain or gzipped: train, dev, test."""
    paths = Path(folder, "qrels").glob("*")
    names = [re.fullmatch(r"([^.].*)\.tsv(\.gz)?", path.name) for path in paths]
    return sorted({name[1] for name in names if name})


def read_task(folder, split):
    """(documents: id -> text, queries: id -> text, judgements, prefixes) of one split.

    Raises InputError where the folder is not a task, naming file and line."""
    folder = Path(folder)
    documents, queries = (read_texts(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    path, meta = folder / "qrels" / f"{split}.tsv", folder / "meta.json"
    judged = read_judgements(path, queries, documents)
    if not judged:
        raise InputError(f"{path} judges no document relevant")
    prefixes = read_json(meta).get("prefixes", {}) if meta.is_file() else {}
    if not isinstance(prefixes, dict) or not all(isinstance(x, str) for x in prefixes.values()):
        raise InputError(f'{meta}: prefixes are not {{"query": "...", "document": "..."}}')
    return documents, queries, judged, PREFIXES | prefixes


def json_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path, rows):
    write_text(path, "".join(map(json_line, rows)))


def write_task(folder, documents, queries, prefixes):
    """Writes the BEIR layout. documents: id -> text; queries: split -> list of (query, ids of the
    documents that answer it); prefixes: {"query": ..., "document": ...}."""
    folder, query_rows = Path(folder), []
    write_jsonl(folder / "corpus.jsonl", ({"_id": i, "text": t} for i, t in documents.items()))
    for split, rows in queries.items():
        lines = ["query-id\tcorpus-id\tscore"]
        for i, (query, answers) in enumerate(rows):
            query_rows.append({"_id": f"{split}-{i}", "text": query})
            lines += [f"{split}-{i}\t{answer}\t1" for answer in dict.fromkeys(answers)]
        write_text(folder / "qrels" / f"{split}.tsv", "\n".join(lines) + "\n")
    write_jsonl(folder / "queries.jsonl", query_rows)
    write_json(folder / "meta.json", {"prefixes": prefixes})
