"""A folder of notes -> a data folder: Markdown or plain text becomes pairs.

A title and its text, headings and the section below them belong together: weak supervision of the
kind that the paper takes from the web (sec. 4.2), enough to adapt a model to a field's vocabulary.

    stage 1, text          every file, without markup (data/markup.py)
    stage 2, weak pairs    title -> document, headings -> section, first paragraph -> the rest; of
                           one paragraph alone, each sentence -> the paragraph
    stage 3, supervised    headings -> section again: a heading is the nearest to a question that
                           notes have. Stage 3 adds hard negatives, such as sections beside it
    held out               whole files, by a hash of their names: dev to tune on, test to report.
                           The task is headings -> section, among the sections of all files

    python data/folder.py docs                     # writes out/docs
    python data/folder.py docs --show=20           # prints sampled pairs, for a person to judge
    python data/folder.py docs --add=out/pydocs    # trains on that data folder's text as well
    python data/folder.py docs --tokenizer=DIR/tokenizer.json        # another model's

Use --add where there is little text: it also brings its tokenizer, and one batch in five is of the
notes' own pairs ("weight" in meta.json). If fewer than three files have headings, the task is the
first of title -> document, first paragraph -> the rest, first sentence -> the rest that three have.
"""

import itertools
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import find_checkpoint
from common.files import fingerprint, load_tokenizer
from common.options import InputError, cli, read_options, split_words
from data import prepare
from data.duplicates import NearDuplicates, words
from data.markup import read_markup
from data.prepare import LONGEST, SEARCH
from data.tokenizer import train_tokenizer

SUFFIXES = (".md", ".markdown", ".txt")
SENTENCE_END = re.compile(r"(?<=[.!?।॥؟۔။])\s+|(?<=[。！？])")
PREFIXES = {  # in the order in which they are chosen as the task
    "heading-section": SEARCH,
    "title-document": dict.fromkeys(SEARCH, "classification: "),  # like Wikipedia's titles
    "opening-rest": dict.fromkeys(SEARCH, "clustering: "),  # like StackExchange's body -> body
    "sentence-text": SEARCH,
}


@dataclass
class Options:
    out: str = ""  # the data folder to write; default: out/NAME, after the folder that is read
    add: str = ""  # a data folder to train on as well: out/pydocs
    tokenizer: str = ""  # a tokenizer.json to use; default: that of --add, or a new one
    vocab_size: int = 8192  # of the new tokenizer [300, 1000000]
    show: int = 0  # how many pairs to print, drawn at random from all sources [0, 1000]


@dataclass
class Document:
    """One file: its name within the folder, its title, and (headings, prose) of each section."""

    name: str
    title: str
    sections: list

    @property
    def text(self):
        """Everything below the title, with each heading once."""
        blocks, above = [], ()
        for headings, prose in self.sections:
            blocks += [h for i, h in enumerate(headings) if headings[: i + 1] != above[: i + 1]]
            blocks.append(prose)
            above = headings
        return "\n\n".join(blocks)


def read_document(path, name):
    """Raises InputError for a file that is not UTF-8."""
    try:
        title, sections = read_markup(path.read_text("utf-8-sig"), path.suffix.lower())
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; convert or remove the file") from None
    title = title or re.sub(r"[-_\s]+", " ", path.stem)
    return Document(name, title.encode(errors="replace").decode(), sections)  # no lone surrogates


def read_folder(folder):
    """(documents, left out: name -> reason) of all files with one of the SUFFIXES. A name is the
    path within the folder, with escapes for what an id cannot hold."""
    folder, documents, left_out = Path(folder), [], {}
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with {', '.join(SUFFIXES)}")
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        name = repr("/".join(parts))[1:-1]
        if path.is_symlink() and not path.is_file():
            left_out[name] = "link to a folder or to nothing"
        elif path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        elif any(p.startswith(".") or p in ("_build", "node_modules") for p in parts):
            left_out[name] = "hidden, or in a built folder"
        else:
            documents.append(read_document(path, name))
    left_out |= {d.name: "fewer than ten words" for d in documents if len(words(d.text)) < 10}
    documents = [document for document in documents if document.name not in left_out]
    new = NearDuplicates(share=0.8).add_new([document.text for document in documents])
    copies = itertools.compress(documents, ~new)
    left_out |= {document.name: "copy of another file" for document in copies}
    return list(itertools.compress(documents, new)), left_out


# ------------------------------------------------------------------------------------------------
# Documents -> pairs


def pairs_of(document, left_out):
    """Yields (source, query, text) for every pair of a document that says something: enough words
    on both sides, and a text that is prose. The others are counted in left_out, a Counter.

    The query of a section: Type Hints > Rationale > Non-goals."""
    pairs = [("title-document", document.title, document.text, 1)]
    for headings, prose in document.sections:
        opening, _, below = prose.partition("\n\n")
        if below:
            pairs.append(("opening-rest", opening, below, 8))
        else:
            first, *others = SENTENCE_END.split(prose)
            pairs.append(("sentence-text", first, " ".join(others), 3))
        if headings:
            query = " > ".join([document.title, *headings])
            pairs.append(("heading-section", query, prose, 2))
    for source, query, text, least in pairs:
        query, text = query[:LONGEST], text[:LONGEST].strip("\n")
        # letters and marks; spaces are Z, newlines C
        letters = sum(unicodedata.category(c)[0] in "LMZC" for c in text)
        enough = len(words(query)) >= least and len(words(text)) >= 15
        if enough and re.search(r"[^\W\d_]", query) and letters >= 0.7 * len(text):
            yield source, query, text
        else:
            left_out["pairs too short or with few letters"] += 1


def pairs_by_source(documents, left_out):
    """source -> [(name of the file, query, text)], of nearly equal texts the first."""
    pairs = {source: [] for source in PREFIXES}
    for document in documents:
        for source, query, text in pairs_of(document, left_out):
            pairs[source].append((document.name, query, text))
    for source, rows in pairs.items():
        new = NearDuplicates().add_new([text for _, _, text in rows])
        pairs[source] = list(itertools.compress(rows, new))
        left_out["pairs with nearly equal text"] += len(rows) - int(new.sum())
    return pairs


def choose_task(pairs, left_out):
    """The source that becomes the retrieval task, and the names of the files that have it.

    Raises InputError where fewer than 3 files have pairs: one is needed for each split."""
    names = {}
    for source, rows in pairs.items():
        first = {query: name for name, query, _ in reversed(rows)}  # of equal queries the first
        names[source] = sorted(set(first.values()))
        left_out["pairs with equal headings or titles"] += len(rows) - len(first)
        if len(names[source]) >= 3:
            return source, names[source]
    raise InputError(
        f"{max(map(len, names.values()))} files have text under headings or titles of their own: 3 "
        f"are needed, one to train on, one to tune on and one to test on ({counted(left_out)})"
    )


def counted(left_out):
    """What is left out, and how often, for a message."""
    counts = (f"{count:,} {what}" for what, count in left_out.items() if count)
    return ", ".join(counts) or f"no file of {', '.join(SUFFIXES)}"


def move_files(splits, names):
    """Changes splits (name of a file -> train, dev or test) where one has none of these files."""
    by_hash = sorted(names, key=lambda name: prepare.split_of(name, 50, 50) + name)
    for split in ("dev", "test", "train"):
        count = Counter(splits[name] for name in names)
        if not count[split]:
            splits[next(name for name in by_hash if count[splits[name]] > 1)] = split


def write(out, documents, tokenizer, meta, options):
    """Writes the data folder. tokenizer: None trains one on these documents."""
    splits = {document.name: prepare.split_of(document.name) for document in documents}
    documents = sorted(documents, key=lambda d: splits[d.name] == "train")  # held-out files first
    left_out = Counter(meta["files"])
    rows_of = pairs_by_source(documents, left_out)
    print(f"  files and pairs: {counted(left_out)}")
    task, names = choose_task(rows_of, left_out)
    move_files(splits, names)

    texts, pairs = {"train": [], "dev": [], "test": []}, {}
    for document in documents:
        text = f"{document.title}\n\n{document.text}"
        texts[splits[document.name]].append((document.name, text))
    held_out = [document.text for document in documents if splits[document.name] != "train"]
    long = [text for text in held_out if len(words(text)) >= prepare.LONG]
    for source, rows in rows_of.items():
        training = [(query, text) for file, query, text in rows if splits[file] == "train"]
        if source == "sentence-text":  # the task has the first sentence alone, training has all
            training = [
                (sentence, f"{first} {rest}")
                for first, rest in training
                for sentence in (first, *SENTENCE_END.split(rest))
                if len(words(sentence)) >= 3
            ]
        pairs[f"stage2/{source}"] = training
    pairs[f"stage3/{task}"] = pairs[f"stage2/{task}"]
    corpus, queries, earlier = {}, {"dev": [], "test": []}, set()
    for file, query, text in rows_of[task]:
        name = f"{file}#{len(corpus)}"
        corpus[name] = text
        if splits[file] != "train" and query not in earlier:
            queries[splits[file]].append((query, [name]))
        earlier.add(query)
    training = [text for _, text in texts["train"]]
    tokenizer = tokenizer or train_tokenizer(training, options.vocab_size)
    tasks = {task: (corpus, queries)}
    add = Path(options.add) if options.add else None
    prepare.write_folder(out, tokenizer, PREFIXES, texts, pairs, tasks, long, meta, add)


def main(arguments):
    folders, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    if len(folders) != 1:
        raise InputError(f"{len(folders)} folders given: python data/folder.py PATH")
    folder, add = folders[0], options.add
    if add and options.tokenizer:
        raise InputError("--add brings its tokenizer: leave out --tokenizer, or --add")
    out = Path(options.out or Path("out", Path(folder).resolve().name))
    origin = find_checkpoint(options.tokenizer) if options.tokenizer else add
    tokenizer = load_tokenizer(origin) if origin else None
    documents, left_out = read_folder(folder)
    texts = "\0".join(f"{d.name}\0{d.title}\0{d.text}" for d in documents)
    inputs = {"script": "data/folder.py", "vocab_size": options.vocab_size}
    inputs["texts"] = fingerprint(texts.encode())  # not the folder's name: it has many spellings
    inputs["tokenizer"] = fingerprint(tokenizer) if origin else ""
    inputs["add"] = [Path(add).name, fingerprint(Path(add, "meta.json"))] if add else []
    if not prepare.is_made(out, inputs):
        for name, reason in list(left_out.items())[:5]:
            print(f"  {name}: {reason}")
        files = {"read": len(documents), **Counter(left_out.values())}
        with prepare.data_folder(out) as new:
            write(new, documents, tokenizer, {"inputs": inputs, "files": files}, options)
    if options.show:
        prepare.show_pairs(out, options.show, Path(add) if add else None)


if __name__ == "__main__":
    cli(main)
