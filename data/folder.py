"""A folder of notes -> a data folder: Markdown, reStructuredText or plain text becomes pairs.

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

Use --add where there is little text: it also brings its tokenizer. The notes' own pairs then weigh
so much that one batch in five is of them ("weight" in meta.json; `--weights` of a stage overrides
it). If fewer than three files have headings, the task is the first of title -> document, first
paragraph -> the rest, and first sentence -> the rest that three files have.
"""

import codecs
import itertools
import os
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import fingerprint, load_tokenizer
from common.options import InputError, cli, read_options, split_words
from data import prepare
from data.duplicates import NearDuplicates, words
from data.markup import read_markup
from data.prepare import LONGEST, SEARCH

SUFFIXES = (".md", ".markdown", ".rst", ".txt")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
PREFIXES = {  # in the order in which they are chosen as the task
    "heading-section": SEARCH,
    "title-document": ("classification: ", "classification: "),  # like the paper's Wikipedia titles
    "opening-rest": ("clustering: ", "clustering: "),  # like StackExchange's body -> body
    "sentence-text": SEARCH,
}


@dataclass
class Options:
    out: str = ""  # the data folder to write; default: out/NAME, after the folder that is read
    add: str = ""  # data folders to train on as well, separated by commas: out/pydocs
    tokenizer: str = ""  # a tokenizer.json to use; default: that of --add, or a new one
    vocab_size: int = 8192  # of the new tokenizer [300, 1000000]
    held_out: str = ""  # retrieval tasks that must not be trained on, separated by commas
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
        parts, above = [], ()
        for headings, prose in self.sections:
            parts += [h for i, h in enumerate(headings) if headings[: i + 1] != above[: i + 1]]
            parts.append(prose)
            above = headings
        return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------
# Files -> documents


def files_in(folder):
    """All files with one of the SUFFIXES, in the order of their names. Links to folders are
    followed, each folder is read once, and hidden and built ones are skipped."""
    found, visited = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(path))
        hidden = (".", "_build", "node_modules")
        folders[:] = [name for name in folders if not name.startswith(hidden)]
        names = [name for name in names if not name.startswith(hidden)]
        found += [Path(path, name) for name in names if name.lower().endswith(SUFFIXES)]
    return sorted(path for path in found if path.is_file())


def read_document(path, name):
    """Raises InputError for a file that is not UTF-8, and has no byte order mark of UTF-16."""
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; convert or remove the file") from None
    title, sections = read_markup(text, path.suffix.lower())
    return Document(name, title or re.sub(r"[-_]+", " ", path.stem), sections)


def read_folder(folder):
    """(documents, left out: name -> reason). Raises InputError for a folder without text."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder: give one with {', '.join(SUFFIXES)}")
    paths = files_in(folder)
    names = [re.sub(r"\s", " ", path.relative_to(folder).as_posix()) for path in paths]
    documents = list(map(read_document, paths, names))  # names become ids, in files with tabs
    left_out = {d.name: "no text" for d in documents if len(words(d.text)) < 10}
    documents = [document for document in documents if document.name not in left_out]
    if not documents:
        raise InputError(f"{folder} has no text: no file of {', '.join(SUFFIXES)} has ten words")
    new = NearDuplicates(share=0.8).add_new([document.text for document in documents])
    copies = itertools.compress(documents, ~new)
    left_out |= {document.name: "copy of another file" for document in copies}
    return list(itertools.compress(documents, new)), left_out


# ------------------------------------------------------------------------------------------------
# Documents -> pairs


def pairs_of(document):
    """(source, query, text) for every pair of a document that says something: enough words on both
    sides, and a text that is prose. The query of a section: Type Hints > Rationale > Non-goals."""
    pairs = [("title-document", document.title, document.text, 1)]
    for headings, prose in document.sections:
        opening, _, rest = prose.partition("\n\n")
        pairs.append(("opening-rest", opening, rest, 8))
        if not rest:
            first, *others = SENTENCE_END.split(prose)
            pairs.append(("sentence-text", first, " ".join(others), 3))
        if headings:
            query = " > ".join([document.title, *headings])
            pairs.append(("heading-section", query, prose, 2))
    for source, query, text, least in pairs:
        query, text = query[:LONGEST], text[:LONGEST].strip("\n")
        letters = sum(c.isalpha() or c.isspace() for c in text)
        says_something = len(words(query)) >= least and any(map(str.isalpha, query))
        if says_something and len(words(text)) >= 15 and letters >= 0.7 * len(text):
            yield source, query, text


def choose_task(documents):
    """The source that becomes the retrieval task, and the names of the files that have it.

    Raises InputError where fewer than 3 files have pairs: one is needed for each split."""
    found, asked = {source: {} for source in PREFIXES}, set()
    for document in documents:
        for source, query, _ in pairs_of(document):
            if (source, query) not in asked:
                found[source][document.name] = None
                asked.add((source, query))
    for source, names in found.items():
        if len(names) >= 3:
            return source, list(names)
    raise InputError(
        f"{max(map(len, found.values()))} files have a section below a heading, or two sentences: "
        "3 are needed, one to train on, one to tune on and one to test on"
    )


def split_files(documents, asked):
    """name -> train, dev or test. Where a split has none of the files `asked`, the one with the
    smallest hash is moved there."""
    splits = {document.name: prepare.split_of(document.name) for document in documents}
    by_hash = sorted(asked, key=lambda name: prepare.split_of(name, 50, 50) + name)
    for split in ("dev", "test", "train"):
        count = Counter(splits[name] for name in asked)
        if not count[split]:
            splits[next(name for name in by_hash if count[splits[name]] > 1)] = split
    return splits


def assemble(documents, splits, task):
    """Everything that is written, as text: (name, text) of each split, pairs of each source, the
    documents and the queries of the task."""
    documents = sorted(documents, key=lambda d: splits[d.name] == "train")  # held-out files first
    texts = {"train": [], "dev": [], "test": []}
    found = {source: [] for source in PREFIXES}  # (name of the file, query, text)
    for document in documents:
        texts[splits[document.name]].append((document.name, f"{document.title}\n\n{document.text}"))
        for source, query, text in pairs_of(document):
            found[source].append((document.name, query, text))
    pairs, corpus, queries, asked = {}, {}, {"dev": [], "test": []}, set()
    for source, rows in found.items():
        new = NearDuplicates().add_new([text for _, _, text in rows])
        found[source] = list(itertools.compress(rows, new))
        training = [(query, text) for name, query, text in found[source] if splits[name] == "train"]
        if source == "sentence-text":  # the task has the first sentence alone, training has all
            training = [
                (sentence, f"{first} {rest}")
                for first, rest in training
                for sentence in (first, *SENTENCE_END.split(rest))
                if len(words(sentence)) >= 3
            ]
        pairs[f"stage2/{source}"] = training
    pairs[f"stage3/{task}"] = pairs[f"stage2/{task}"]
    for file, query, text in found[task]:
        name = f"{file}#{len(corpus)}"
        corpus[name] = text
        if splits[file] != "train" and query not in asked:
            queries[splits[file]].append((query, [name]))
        asked.add(query)
    return texts, pairs, corpus, queries


def long_documents(documents, splits, others=100, questions=4):
    """Held-out files that are long, with queries that each ask for one section of a file.

    Returns (their texts, pool: name -> text, queries: (headings, [name]))."""
    long = [document for document in documents if len(words(document.text)) >= prepare.LONG]
    held_out = {d.name: d.text for d in long if splits[d.name] != "train"}
    queries = []
    for document in long:
        if document.name in held_out:
            chosen = [" > ".join(headings) for headings, _ in document.sections if headings]
            chosen = [query for query in chosen if len(words(query)) >= 3]
            step = max(1, len(chosen) // questions)
            queries += [(query, [document.name]) for query in chosen[::step][:questions]]
    pool = [(d.name, d.text) for d in long if splits[d.name] == "train"][:others]
    return list(held_out.values()), {**held_out, **dict(pool)}, queries


def write(out, documents, tokenizer, meta, options, added):
    """Writes the data folder. tokenizer: None trains one on these documents."""
    task, asked = choose_task(documents)
    splits = split_files(documents, asked)
    texts, pairs, corpus, queries = assemble(documents, splits, task)
    training = [text for _, text in texts["train"]]
    tokenizer = tokenizer or prepare.train_tokenizer(training, options.vocab_size)
    long, tasks = long_documents(documents, splits), {task: (corpus, queries)}
    prepare.write_folder(
        out, tokenizer, PREFIXES, texts, pairs, tasks, long, meta, options.held_out, added
    )


# ------------------------------------------------------------------------------------------------


def main(arguments):
    folders, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    if len(folders) != 1:
        raise InputError(f"{len(folders)} folders given: python data/folder.py PATH")
    began, folder = time.time(), folders[0]
    out = Path(options.out or Path("out", Path(folder).resolve().name))
    added = [Path(name) for name in options.add.split(",") if name]
    if len({path.name for path in added}) < len(added):
        raise InputError(
            f"--add={options.add}: two folders have one name, and so would their sources"
        )
    given = [load_tokenizer(path) for path in (options.tokenizer, *added) if path]
    if len(set(map(fingerprint, given))) > 1:
        raise InputError("--tokenizer and --add have different tokenizers: their token ids differ")
    documents, left_out = read_folder(folder)
    inputs = {"script": "data/folder.py", "folder": folder, **asdict(options)}
    for name in ("out", "show"):  # these do not change what is written
        del inputs[name]
    text = "\0".join(f"{d.name}\0{d.title}\0{d.text}" for d in documents)
    metas = [fingerprint(path / "meta.json") for path in added]
    inputs["changed"] = [fingerprint(text.encode()), *metas, *map(fingerprint, given)]
    if not prepare.is_made(out, inputs):
        for name, reason in list(left_out.items())[:5]:
            print(f"  {name}: {reason}")
        files = {"read": len(documents), **Counter(left_out.values())}
        print(f"  files: {', '.join(f'{n:,} {what}' for what, n in files.items())}")
        tokenizer, meta = given[0] if given else None, {"inputs": inputs, "files": files}
        with prepare.data_folder(out) as new:
            write(new, documents, tokenizer, meta, options, added)
        print(f"wrote {out} in {time.time() - began:.0f} s")
    if options.show:
        prepare.show_pairs(out, options.show, added)


if __name__ == "__main__":
    cli(main)
