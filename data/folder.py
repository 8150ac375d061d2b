"""A folder of notes -> a data folder: Markdown, reStructuredText or plain text becomes pairs.

Whoever wrote the notes also wrote what belongs together: a title and its text, headings and the
section below them. That is weak supervision of the kind that the paper takes from the web
(sec. 4.2), and it is enough to adapt a model to the words of one's own field:

    stage 1, text          every file, without markup (data/markup.py)
    stage 2, weak pairs    title -> document, headings -> section, first paragraph -> the rest
    stage 3, supervised    headings -> section again. A folder has no questions with answers; a
                           heading is the nearest to a question that a person wrote, and what stage
                           3 adds are the near misses: other sections of the same text
    held out               whole files, by a hash of their names: dev to tune on, test to report.
                           The task is headings -> section, among the sections of all files

    python data/folder.py docs                     # writes out/docs
    python data/folder.py docs --show=20           # prints sampled pairs, to judge for yourself
    python data/folder.py docs --add=out/pydocs    # trains on that data folder's text as well
    python data/folder.py docs --tokenizer=DIR/tokenizer.json        # another model's

With little text of one's own, --add is what makes a model of it: it brings its tokenizer along.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.contamination import HeldOut, contamination
from data.markup import read_markup
from data.prepare import (
    NearDuplicates,
    data_folder,
    read_tokenizer,
    show_pairs,
    split_of,
    train_tokenizer,
    words,
    write_documents,
    write_jsonl,
    write_pairs,
    write_retrieval,
)
from data.write import add_stored
from options import InputError, read_options, run

SUFFIXES = (".md", ".markdown", ".rst", ".txt")
SEARCH = ("search_query: ", "search_document: ")
PREFIXES = {
    "title-document": ("classification: ", "classification: "),  # as the paper's Wikipedia titles
    "heading-section": SEARCH,
    "opening-rest": ("clustering: ", "clustering: "),  # as StackExchange's body -> body
}
TASK = "heading-section"
LONGEST = 1200  # characters of a query or document that are kept for training, some 300 tokens
LONG = 900  # words: well beyond 8 times the 128 tokens that the laptop preset trains with


@dataclass
class Options:
    out: str = ""  # the data folder to write; empty: out/NAME, after the folder that is read
    add: str = ""  # data folders to train on as well, with commas between them: out/pydocs
    tokenizer: str = ""  # a tokenizer.json to use; empty: that of --add, or one trained on the text
    vocab_size: int = 8192  # of the tokenizer that is trained
    held_out: str = ""  # tasks in the BEIR layout that must not be trained on, with commas
    strict: bool = False  # a file that is empty or a copy of another is an error
    show: int = 0  # prints so many pairs, drawn at random from all sources


@dataclass
class Document:
    """One file: its name within the folder, its title, and (headings, prose) of each section."""

    name: str
    title: str
    sections: list

    @property
    def text(self):
        """As it is read from top to bottom, headings included, the title not."""
        parts, above = [], ()
        for headings, prose in self.sections:
            new = [h for i, h in enumerate(headings) if headings[: i + 1] != above[: i + 1]]
            parts += [*new, prose]
            above = headings
        return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------
# Files -> documents -> pairs


def read_folder(folder):
    """The documents of a folder, in the order of their names, and why files were left out.

    Raises InputError for a folder that is missing or without text, and a file that is not UTF-8."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one that holds {', '.join(SUFFIXES)}")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    paths = [path for path in paths if path.is_file() and not hidden(path.relative_to(folder))]
    documents, left_out, seen = [], [], NearDuplicates(threshold=0.8)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        data = path.read_bytes()
        try:
            title, sections = read_markup(data.decode("utf-8"), path.suffix.lower())
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise InputError(
                f"{path}, line {line}: not UTF-8; convert or remove the file"
            ) from None
        document = Document(name, title or re.sub(r"[-_]+", " ", path.stem), sections)
        if len(words(document.text)) < 10:
            left_out.append((name, "no text"))
        elif not seen.add(document.text):
            left_out.append((name, "copy of another file"))
        else:
            documents.append(document)
    if not documents:
        raise InputError(f"{folder} has no text: no file of {', '.join(SUFFIXES)} with ten words")
    return documents, left_out


def hidden(path):
    return any(part.startswith((".", "_build", "node_modules")) for part in path.parts)


def spoken(document, headings):
    """Type Hints > Rationale and Goals > Non-goals"""
    return " > ".join([document.title, *headings])


def pairs_of(document):
    """(source, query, document) for every pair that a document gives."""
    yield "title-document", document.title, document.text
    for headings, prose in document.sections:
        if headings:
            yield "heading-section", spoken(document, headings), prose
        opening, _, rest = prose.partition("\n\n")
        yield "opening-rest", opening, rest


def acceptable(source, query, document):
    """Pairs that say something: enough words on both sides, and a document that is prose."""
    enough = {"title-document": 1, "heading-section": 2, "opening-rest": 8}[source]
    found = words(document[:LONGEST])
    letters = sum(c.isalpha() or c.isspace() for c in document[:LONGEST])
    prose = letters >= 0.7 * len(document[:LONGEST])
    return len(words(query)) >= enough and len(found) >= 15 and prose


def split_files(documents):
    """name -> train, dev or test. In a folder so small that a split would be empty, the files of
    the smallest hashes fill it."""
    splits = {document.name: split_of(document.name) for document in documents}
    asked = [d.name for d in documents if any(acceptable(*pair) for pair in queries_of(d))]
    if len(asked) < 3:
        raise InputError(
            f"{len(asked)} files have a section below a heading: 3 are needed, one to train on, "
            "one to tune on and one to test on"
        )
    free = sorted(asked, key=lambda name: split_of(name, 50, 50) + name)
    for split in ("dev", "test", "train"):
        if not any(splits[name] == split for name in asked):
            count = {where: sum(splits[n] == where for n in asked) for where in splits.values()}
            name = next(n for n in free if count[splits[n]] > 1)
            splits[name] = split
    return splits


def queries_of(document):
    return [pair for pair in pairs_of(document) if pair[0] == TASK]


def assemble(documents):
    """Everything that goes to disk, as text."""
    splits = split_files(documents)
    texts = {"train": [], "dev": [], "test": []}  # stage 1, and what search finds
    pairs = {source: [] for source in PREFIXES}
    corpus, queries, asked = {}, {"dev": [], "test": []}, set()
    seen = {source: NearDuplicates() for source in PREFIXES}
    for document in sorted(documents, key=lambda d: splits[d.name] == "train"):  # held out first
        where = splits[document.name]
        texts[where].append((document.name, f"{document.title}\n\n{document.text}"))
        for source, query, text in pairs_of(document):
            query, text = query[:LONGEST], text[:LONGEST].strip("\n")
            if not acceptable(source, query, text) or not seen[source].add(text):
                continue
            if where == "train":
                pairs[source].append((query, text))
            if source == TASK:
                name = f"{document.name}#{len(corpus)}"
                corpus[name] = text
                if where != "train" and query not in asked:
                    queries[where].append((query, name))
                asked.add(query)
    return texts, pairs, corpus, queries, splits


def long_documents(documents, splits, others=100, questions=4):
    """Held-out files that are long, with queries that each ask for one section of a file: a needle
    in it. -> (their texts, pool: name -> text, queries: (headings, name))."""
    held_out, pool, queries = [], {}, []
    for document in documents:
        long = len(words(document.text)) >= LONG
        if long and splits[document.name] != "train":
            held_out.append(document.text)
            pool[document.name] = document.text
            chosen = [" > ".join(headings) for headings, _ in document.sections if headings]
            chosen = [query for query in chosen if len(words(query)) >= 3]
            step = max(1, len(chosen) // questions)
            queries += [(query, document.name) for query in chosen[::step][:questions]]
    for document in documents:
        if splits[document.name] == "train" and len(words(document.text)) >= LONG and others:
            pool[document.name], others = document.text, others - 1
    return held_out, pool, queries


# ------------------------------------------------------------------------------------------------


def prepare(folder, options):
    """Writes the data folder, and returns where."""
    began, out = time.time(), Path(options.out or Path("out", Path(folder).resolve().name))
    added = [Path(name) for name in options.add.split(",") if name]
    given = read_tokenizer(options.tokenizer, added)
    documents, left_out = read_folder(folder)
    for name, reason in left_out[:5]:
        if options.strict:
            raise InputError(f"{Path(folder, name)}: {reason} (--strict)")
        print(f"  {name}: {reason}")
    texts, pairs, corpus, queries, splits = assemble(documents)
    pages, pool, questions = long_documents(documents, splits)

    inputs = {"script": "data/folder.py", "folder": str(folder), **asdict(options)}
    with data_folder(out) as new:
        training_text = [text for _, text in texts["train"]]
        tokenizer = given or train_tokenizer(training_text, options.vocab_size)
        tokenizer.save(str(new / "tokenizer.json"))
        write_retrieval(new / "retrieval" / TASK, corpus, queries, PREFIXES[TASK])
        tasks = [new / "retrieval" / TASK, *(name for name in options.held_out.split(",") if name)]
        held_out = HeldOut.of_tasks(tasks, tokenizer)
        written, removed = write_all(new, texts, pages, pairs, added, tokenizer, held_out)
        if questions:
            write_retrieval(new / "long" / "pages", pool, {"test": questions}, SEARCH)
        rows = [{"_id": n, "text": text} for rows in texts.values() for n, text in rows]
        write_jsonl(new / "search" / "corpus.jsonl", rows)
        reasons = [reason for _, reason in left_out]
        meta = {
            "inputs": inputs,
            "rows": written,
            "contamination": contamination(held_out, removed),
        }
        meta["files"] = {"read": len(documents), **{r: reasons.count(r) for r in set(reasons)}}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
    describe(meta, texts, corpus, queries)
    print(f"wrote {out} in {time.time() - began:.0f} s")
    return out


def write_all(new, texts, pages, pairs, added, tokenizer, held_out):
    """All columns of tokens. -> source -> rows; source -> rows of training text that were left out
    for a reason."""
    written, removed = {}, {}

    def note(name, result):
        written[name], removed[name] = result[0]["rows"], result[1]

    for split in ("dev", "test"):
        write_documents(new / "stage1" / split, [text for _, text in texts[split]], tokenizer)
    write_documents(new / "stage1" / "long", pages, tokenizer)
    own = [text for _, text in texts["train"]]
    note("stage1/train", add_stored(new / "stage1/train", added, tokenizer, held_out, own))
    for source, rows in ((source, rows) for source, rows in pairs.items() if rows):
        for stage in ("stage2", "stage3") if source == TASK else ("stage2",):
            name = f"{stage}/{source}"
            note(name, write_pairs(new / name, rows, PREFIXES[source], tokenizer, held_out))
    for path in (meta.parent for a in added for meta in sorted(a.glob("stage[23]/*/meta.json"))):
        name = f"{path.parent.name}/{path.name}"
        if name in written:
            name += f"-{path.parents[1].name}"  # a source of that name is here
        note(name, add_stored(new / name, [path], tokenizer, held_out))
    return written, removed


def describe(meta, texts, corpus, queries):
    files = ", ".join(f"{count:,} {what}" for what, count in meta["files"].items())
    print(f"  files: {files}; " + ", ".join(f"{len(t):,} {split}" for split, t in texts.items()))
    for name, rows in meta["rows"].items():
        print(f"  {name:32} {rows:8,} {'texts' if name.startswith('stage1') else 'pairs'}")
    asked = ", ".join(f"{len(rows):,} {split} queries" for split, rows in queries.items())
    print(f"  retrieval/{TASK:22} {len(corpus):8,} documents, {asked}")
    removed = meta["contamination"]["removed"]
    print(f"  {removed:,} training rows that repeat held-out text were left out")


def main(arguments):
    folders = [argument for argument in arguments if not argument.startswith("--")]
    options, _ = read_options(Options, [a for a in arguments if a.startswith("--")])
    if len(folders) != 1:
        raise InputError(f"{len(folders)} folders given: python data/folder.py PATH")
    out = prepare(folders[0], options)
    if options.show:
        show_pairs(out, options.show)


if __name__ == "__main__":
    run(main)
