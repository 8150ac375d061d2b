"""The embedded data set: the documentation of the Python that runs this file.

Every machine that can train nanoEmbed holds some 20 MB of documentation about itself: the
docstrings of the standard library, of torch, numpy, tokenizers, tqdm and of what torch needs.
Nothing is downloaded, and nothing is imported: source files are read (data/docstrings.py).

One docstring gives several kinds of pairs, as one web page did for the paper (sec. 4.2):

    stage 1, text          every docstring, and the topics of the language reference
    stage 2, weak pairs    name -> docstring, summary -> code, heading -> section,
                           first half -> second half, comment -> the code below it, name ->
                           code of functions without a docstring
    stage 3, supervised    summary line -> body
    held out               whole modules of the core packages, chosen by a hash of their names:
                           dev to tune on, test to report; near duplicates are removed first

    python data/pydocs.py                      # writes out/pydocs; again: says that it is there
    python data/pydocs.py --show=20            # prints sampled pairs, for a person to judge
    python data/pydocs.py --packages=pip,rich  # adds installed packages
"""

import json
import platform
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.contamination import HeldOut, contamination
from data.docstrings import package_root, read_packages, requirements_of
from data.prepare import (
    NearDuplicates,
    show_pairs,
    split_of,
    train_tokenizer,
    whole_or_nothing,
    words,
    write_documents,
    write_jsonl,
    write_pairs,
    write_retrieval,
)
from options import InputError, read_options, run

# source -> the prefixes of its queries and documents, given as the paper gives them (sec. 4.2.2)
SEARCH = ("search_query: ", "search_document: ")
PREFIXES = {
    "name-docstring": SEARCH,
    "summary-code": SEARCH,
    "comment-code": SEARCH,
    "name-code": SEARCH,
    "heading-section": ("classification: ", "classification: "),  # like Wikipedia's titles
    "halves": ("clustering: ", "clustering: "),  # like StackExchange's body -> body
    "summary-body": SEARCH,
}
SUPERVISED = "summary-body"
EVALUATED = ("summary-body", "summary-code")  # these are retrieval tasks too
LONGEST = 1200  # characters of a query or document that are kept for training, some 300 tokens
LONG = 900  # words: well beyond 8 times the 128 tokens that the laptop preset trains with


@dataclass
class Options:
    out: str = "out/pydocs"  # the data folder to write
    packages: str = ""  # installed packages to add, with commas between them: text to train on
    core: str = "stdlib,torch,numpy,tokenizers,tqdm"  # packages with held-out modules
    vocab_size: int = 8192  # of the WordPiece tokenizer that is trained on the training text
    show: int = 0  # prints so many pairs, drawn at random from all sources


# ------------------------------------------------------------------------------------------------
# Entries -> pairs


def summary_and_body(docstring):
    """The first sentence, and all that follows it."""
    first, _, rest = docstring.partition("\n\n")
    summary, *more = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(first.split()), maxsplit=1)
    return summary, "\n\n".join([*more, rest.strip("\n")]).strip("\n")


def sections(docstring):
    """(heading, text) of its sections: underlined headings, and Google's `Args:`."""
    heading = r"^(\S[^\n]{2,60})\n[-=*~]{3,}\n|^([A-Z][\w ]{2,30}):{1,2}\n(?=\s+\S)"
    found = list(re.finditer(heading, docstring, re.M))
    for i, match in enumerate(found):
        end = found[i + 1].start() if i + 1 < len(found) else len(docstring)
        yield (match[1] or match[2]).strip(), docstring[match.end() : end].strip("\n")


def halves(docstring):
    """A text cut in two at the paragraph's end, or else line's, that is nearest to its middle."""
    ends = [match.end() for match in re.finditer(r"\n\n+", docstring)]
    ends = ends or [match.end() for match in re.finditer(r"\n", docstring)] or [len(docstring)]
    cut = min(ends, key=lambda end: abs(end - len(docstring) / 2))
    return docstring[:cut].strip("\n"), docstring[cut:].strip("\n")


def spoken(name):
    """torch.nn.Module.load_state_dict -> torch nn Module load state dict"""
    return re.sub(r"[._]+", " ", name).strip()


def pairs_of(entry):
    """(source, query, document) for every pair that an entry gives."""
    summary, body = summary_and_body(entry.docstring)
    yield "summary-body", summary, body
    yield "summary-code", summary, entry.code
    yield "name-docstring", spoken(entry.name), entry.docstring
    yield "halves", *halves(entry.docstring)
    for heading, text in sections(entry.docstring):
        yield "heading-section", f"{spoken(entry.name)} {heading}", text


def acceptable(query, document):
    """Pairs that say something: 3 words or more, 10 or more, and no mere reference elsewhere."""
    reference = query.startswith(("See ", "Alias for ", "In-place version "))
    return len(words(query)) >= 3 and len(words(document[:200])) >= 10 and not reference


# ------------------------------------------------------------------------------------------------
# Held-out modules


def family(module):
    """What is held out together: a module and its private parts, numpy._core.x with numpy.core.x.

    Docstrings that are attached from outside count to the module of what they document."""
    return ".".join(part.lstrip("_") for part in module.split("."))


def without_near_duplicates(entries, packages):
    """Of texts that are nearly the same, the one with the most public name in the first package."""

    def rank(entry):
        private_parts = sum(part.startswith("_") for part in entry.name.split("."))
        return packages.index(entry.package), private_parts

    seen = NearDuplicates()
    ranked = sorted(entries, key=rank)
    return [e for e in ranked if len(words(e.docstring)) >= 3 and seen.add(e.docstring)]


def pages(entries):
    """Module -> its documentation in one piece, as `help(module)` shows it; the long ones only."""
    texts = {}
    for entry in entries:
        texts.setdefault(entry.module, []).append(f"{entry.name}\n\n{entry.docstring}")
    joined = {module: "\n\n".join(parts) for module, parts in texts.items()}
    return {module: page for module, page in joined.items() if len(words(page)) >= LONG}


def assemble(entries, snippets, core):
    """Everything that goes to disk, as text, from entries without near duplicates."""

    def split(thing):
        return split_of(family(thing.module)) if thing.package in core else "train"

    documents = {"train": [], "dev": [], "test": []}  # stage 1, and what search finds
    pairs = {source: [] for source in PREFIXES}  # of training modules: (query, document)
    corpus = {task: {} for task in EVALUATED}  # of all modules of the core: name -> document
    queries = {task: {"dev": [], "test": []} for task in EVALUATED}  # (query, name)
    seen = {source: NearDuplicates() for source in PREFIXES}
    asked = Counter(summary_and_body(entry.docstring)[0].lower() for entry in entries)
    held_out_code = NearDuplicates()

    for entry in entries:
        where = split(entry)
        documents[where].append((entry.name, f"{entry.name}\n\n{entry.docstring}"))
        for source, query, document in pairs_of(entry):
            if not acceptable(query, document):
                continue
            if source in EVALUATED and not seen[source].add(document):
                continue  # two documents alike could both be the answer
            if where == "train":
                pairs[source].append((query[:LONGEST], document[:LONGEST]))
            elif source == "summary-code":
                held_out_code.add(document)
            if source in EVALUATED and entry.package in core and entry.name not in corpus[source]:
                corpus[source][entry.name] = document
                if where != "train" and asked[query.lower()] == 1:
                    queries[source][where].append((query, entry.name))

    for snippet in snippets:
        source, code = f"{snippet.kind}-code", snippet.code[:LONGEST]
        query = spoken(snippet.text) if snippet.kind == "name" else snippet.text
        if split(snippet) == "train" and acceptable(query, code):
            if seen[source].add(code) and not held_out_code.like(code):
                pairs[source].append((query, code))
    return documents, pairs, corpus, queries


def long_documents(entries, core, others=100, questions=4):
    """Held-out pages, with queries that each ask for one thing on a page: a needle in it.

    -> (pages of held-out modules, pool: name -> page, queries: (query, name)). The summaries that
    became queries are taken out of the page, which has to be found by the rest."""
    groups = {"held out": [], "train": []}
    for entry in entries:
        if entry.package in core:
            held_out = split_of(family(entry.module)) != "train"
            groups["held out" if held_out else "train"].append(entry)
    held_out, pool, queries = pages(groups["held out"]), {}, []
    for module, page in held_out.items():
        listed = [entry for entry in groups["held out"] if entry.module == module]
        chosen = listed[1 :: max(1, len(listed) // questions)][:questions]
        for summary, body in (summary_and_body(entry.docstring) for entry in chosen):
            if acceptable(summary, body):
                queries.append((summary, module))
                page = page.replace(summary, "", 1)
        pool[module] = page
    pool.update(list(pages(groups["train"]).items())[:others])
    return list(held_out.values()), pool, queries


# ------------------------------------------------------------------------------------------------


def prepare(options):
    """Writes the data folder, unless it is there already for the same packages and versions."""
    began, out = time.time(), Path(options.out)
    added = [name for name in options.packages.split(",") if name]
    core = options.core.split(",")
    needed = requirements_of("torch") if "torch" in core else []
    packages = list(dict.fromkeys([*core, *needed, *added]))
    for package in (*core, *added):
        if package_root(package) is None:
            raise InputError(
                f"{package} is not installed here as Python source: pip install {package}"
            )
    inputs = {"script": "data/pydocs.py", "vocab_size": options.vocab_size, "core": core}
    inputs["versions"] = {package: version_of(package) for package in packages}

    meta_path = out / "meta.json"
    if meta_path.is_file() and json.loads(meta_path.read_text()).get("inputs") == inputs:
        print(f"{out} is there, made from the same packages: nothing to do")
    else:
        if out.exists() and not meta_path.is_file():
            raise InputError(f"{out} holds something else than data: --out= chooses another folder")
        entries, snippets = read_packages(packages)
        entries = without_near_duplicates(entries, packages)
        documents, pairs, corpus, queries = assemble(entries, snippets, core)
        held_out_pages, pool, questions = long_documents(entries, core)
        with whole_or_nothing(out) as folder:
            training_text = [text for _, text in documents["train"]]
            training_text += [code for _, code in pairs["summary-code"]]
            tokenizer = train_tokenizer(training_text, options.vocab_size)
            tokenizer.save(str(folder / "tokenizer.json"))
            for task in EVALUATED:
                where = folder / "retrieval" / task
                write_retrieval(where, corpus[task], queries[task], PREFIXES[task])
            held_out = HeldOut.of_tasks((folder / "retrieval").iterdir(), tokenizer)
            rows, removed = write_all(folder, documents, held_out_pages, pairs, tokenizer, held_out)
            write_retrieval(folder / "long" / "pages", pool, {"test": questions}, SEARCH)
            everything = [
                {"_id": name, "text": text} for rows in documents.values() for name, text in rows
            ]
            write_jsonl(folder / "search" / "corpus.jsonl", everything)
            leaks = contamination(held_out, removed)
            meta = {"inputs": inputs, "rows": rows, "contamination": leaks}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        describe(documents, pairs, corpus, queries)
        print(f"  {leaks['removed']:,} training rows that repeat held-out text were left out")
        print(f"wrote {out} in {time.time() - began:.0f} s")
    if options.show:
        show_pairs(out, options.show)
    return out


def write_all(folder, documents, pages, pairs, tokenizer, held_out):
    """All columns of tokens. -> source -> rows; and of training text, what was left out and why."""
    written, removed = {}, {}
    for split, rows in [*documents.items(), ("long", [(None, page) for page in pages])]:
        name, texts = f"stage1/{split}", [text for _, text in rows]
        checked = held_out if split == "train" else None
        _, removed[name] = write_documents(folder / name, texts, tokenizer, checked)
    for source, rows in ((source, rows) for source, rows in pairs.items() if rows):
        name = f"{'stage3' if source == SUPERVISED else 'stage2'}/{source}"
        prefixes = PREFIXES[source]
        meta, removed[name] = write_pairs(folder / name, rows, prefixes, tokenizer, held_out)
        written[source] = meta["rows"]
    return written, removed


def version_of(package):
    try:
        return platform.python_version() if package == "stdlib" else version(package)
    except PackageNotFoundError:
        return "unknown"


def describe(documents, pairs, corpus, queries):
    for split, rows in documents.items():
        print(f"  stage 1, {split:16} {len(rows):7,} documents")
    for source, rows in pairs.items():
        print(f"  stage {3 if source == SUPERVISED else 2}, {source:16} {len(rows):7,} pairs")
    for task in EVALUATED:
        asked = ", ".join(f"{len(rows)} {split} queries" for split, rows in queries[task].items())
        print(f"  evaluation, {task:13} {len(corpus[task]):7,} documents, {asked}")


def main(arguments):
    options, _ = read_options(Options, arguments)
    prepare(options)


if __name__ == "__main__":
    run(main)
