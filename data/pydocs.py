"""The built-in data set: the documentation of the Python that runs this file.

Every machine that can train nanoEmbed holds some 20 MB of documentation: the docstrings of the
standard library, of torch, numpy, tokenizers, tqdm and of what torch needs. Nothing is downloaded,
and nothing is imported: data/docstrings.py reads the source files.

One docstring gives several kinds of pairs, as one web page did in the paper (sec. 4.2):

    stage 1, text          every docstring, and the topics of the language reference
    stage 2, weak pairs    name -> docstring, summary -> code, heading -> section,
                           first half -> second half, comment -> the code below it,
                           name -> code of functions without a docstring
    stage 3, supervised    summary line -> body, and summary -> code again
    held out               whole modules of the core packages, chosen by a hash of their names:
                           dev to tune on, test to report; near duplicates are removed first

    python data/pydocs.py              # writes out/pydocs, unless it is there
    python data/pydocs.py --show=20    # prints sampled pairs, for a person to judge
"""

import itertools
import platform
import re
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.options import InputError, cli, read_options
from data import prepare as shared
from data.docstrings import package_root, read_packages
from data.duplicates import NearDuplicates, runs_of, words
from data.prepare import LONG, LONGEST, SEARCH, split_of
from data.tokenizer import train_tokenizer

NEEDED_BY_TORCH = "filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy triton"
NEEDED_BY_TORCH += " typing_extensions"
PREFIXES = {  # source -> prefixes of its queries and documents, chosen as in the paper (sec. 4.2.2)
    "name-docstring": SEARCH,
    "summary-code": SEARCH,
    "comment-code": SEARCH,
    "name-code": SEARCH,
    "heading-section": dict.fromkeys(SEARCH, "classification: "),  # like Wikipedia's titles
    "halves": dict.fromkeys(SEARCH, "clustering: "),  # like StackExchange's body -> body
    "summary-body": SEARCH,
}
EVALUATED = ("summary-body", "summary-code")  # these are retrieval tasks too


@dataclass
class Options:
    out: str = "out/pydocs"  # the data folder to write
    core: str = "stdlib,torch,numpy,tokenizers,tqdm"  # packages with held-out modules
    vocab_size: int = 8192  # of the WordPiece tokenizer that is trained [300, 1000000]
    show: int = 0  # how many pairs to print, drawn at random from all sources [0, 1000]


# ------------------------------------------------------------------------------------------------
# Entries -> pairs


def summary_and_body(docstring):
    """The first sentence, and the text after it."""
    first, _, rest = docstring.partition("\n\n")
    summary, *more = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(first.split()), maxsplit=1)
    return summary, "\n\n".join([*more, rest.strip("\n")]).strip("\n")


def sections(docstring):
    """(heading, text) of the sections: underlined headings, and Google's `Args:`."""
    heading = r"^(\S[^\n]{2,60})\n[-=*~]{3,}\n|^([A-Z][\w ]{2,30}):{1,2}\n(?=\s+\S)"
    _, *split = re.split(heading, docstring, flags=re.M)
    for underlined, google, text in zip(split[::3], split[1::3], split[2::3], strict=True):
        yield (underlined or google).strip(), text.strip("\n")


def halves(docstring):
    """A text split at the end of the paragraph (or else line) that is nearest to its middle."""
    ends = [match.end() for match in re.finditer(r"\n\n+", docstring)]
    ends = ends or [match.end() for match in re.finditer(r"\n", docstring)] or [len(docstring)]
    middle = min(ends, key=lambda end: abs(end - len(docstring) / 2))
    return docstring[:middle].strip("\n"), docstring[middle:].strip("\n")


def spoken(name):
    """torch.nn.Module.load_state_dict -> torch nn Module load state dict"""
    return re.sub(r"[._]+", " ", name).strip()


def pairs_of(entry):
    """(source, query, document) for every pair that an entry gives."""
    summary, body = summary_and_body(entry.text)
    yield "summary-body", summary, body
    yield "summary-code", summary, entry.code
    yield "name-docstring", spoken(entry.name), entry.text
    yield "halves", *halves(entry.text)
    for heading, text in sections(entry.text):
        yield "heading-section", f"{spoken(entry.name)} {heading}", text


def acceptable(query, document):
    """Whether a pair says something: at least 3 and 10 words, and no mere reference elsewhere."""
    reference = query.startswith(("See ", "Alias for ", "In-place version "))
    return len(words(query)) >= 3 and len(words(document[:200])) >= 10 and not reference


# ------------------------------------------------------------------------------------------------
# Held-out modules


def family(module):
    """What is held out together: a module and its private parts, such as numpy._core.x and
    numpy.core.x."""
    return ".".join(part.lstrip("_") for part in module.split("."))


def without_near_duplicates(entries, packages):
    """The docstrings; of nearly equal ones that with the most public name in the first package."""

    def rank(entry):
        private_parts = sum(part.startswith("_") for part in entry.name.split("."))
        return packages.index(entry.package), private_parts

    documented = [e for e in entries if e.kind == "docstring" and len(words(e.text)) >= 3]
    ranked = sorted(documented, key=rank)
    new = NearDuplicates().add_new([entry.text for entry in ranked])
    return list(itertools.compress(ranked, new))


def assemble(entries, docstrings, core):
    """Everything that is written, as text. docstrings: those of the entries, without near
    duplicates."""

    def split(entry):
        return split_of(family(entry.module)) if entry.package in core else "train"

    documents = {"train": [], "dev": [], "test": []}  # (name, text), for stage 1 and search
    rows_of = {source: [] for source in PREFIXES}  # (entry, split, query, document)
    for entry in docstrings:
        documents[split(entry)].append((entry.name, f"{entry.name}\n\n{entry.text}"))
        for source, query, document in pairs_of(entry):
            if acceptable(query, document):
                rows_of[source].append((entry, split(entry), query, document))
    for source in EVALUATED:  # of two nearly equal documents, both could be the answer
        new = NearDuplicates().add_new([row[-1] for row in rows_of[source]])
        rows_of[source] = list(itertools.compress(rows_of[source], new))
    pairs = {}
    for source, rows in rows_of.items():
        training = [(q[:LONGEST], d[:LONGEST]) for _, where, q, d in rows if where == "train"]
        stage = "stage3" if source == "summary-body" else "stage2"
        pairs[f"{stage}/{source}"] = training

    held_out_code = NearDuplicates()
    held_out_code.add_new([row[-1] for row in rows_of["summary-code"] if row[1] != "train"])
    for kind, spell in (("comment", str), ("name", spoken)):
        own = [e for e in entries if e.kind == kind and split(e) == "train"]
        rows = [(spell(e.text), e.code[:LONGEST]) for e in own]
        rows = [row for row in rows if acceptable(*row)]
        rows = itertools.compress(rows, NearDuplicates().add_new([code for _, code in rows]))
        rows = [row for row in rows if not held_out_code.has_near(runs_of(row[1]))]
        pairs[f"stage2/{kind}-code"] = rows

    pairs["stage3/summary-code"] = pairs["stage2/summary-code"]  # or stage 3 would forget code
    tasks = {}  # source -> (all documents of core modules, queries of held-out ones)
    summaries = Counter(summary_and_body(entry.text)[0].lower() for entry in docstrings)
    for source in EVALUATED:
        corpus, queries = {}, {"dev": [], "test": []}
        for entry, where, query, document in rows_of[source]:
            if entry.package in core and entry.name not in corpus:
                corpus[entry.name] = document
                if where != "train" and summaries[query.lower()] == 1:
                    queries[where].append((query, [entry.name]))
        tasks[source] = corpus, queries
    return documents, pairs, tasks


def long_documents(docstrings, core):
    """The documentation of each held-out module in one piece, like `help(module)`, where long."""
    modules = {}
    for entry in docstrings:
        if entry.package in core and split_of(family(entry.module)) != "train":
            modules.setdefault(entry.module, []).append(f"{entry.name}\n\n{entry.text}")
    pages = ["\n\n".join(texts) for texts in modules.values()]
    return [page for page in pages if len(words(page)) >= LONG]


def prepare(options):
    """Writes the data folder, unless it is there for the same packages and versions."""
    out, core = options.out, list(filter(None, options.core.split(",")))
    for package in core:
        if package_root(package) is None:
            raise InputError(f"{package} is not installed as Python source: pip install {package}")
    needed = NEEDED_BY_TORCH.split() if "torch" in core else []
    packages = [*core, *(p for p in needed if p not in core and package_root(p))]
    inputs = {"script": "data/pydocs.py", "vocab_size": options.vocab_size, "core": core}
    inputs["versions"] = {package: version_of(package) for package in packages}
    if not shared.is_made(out, inputs):
        with shared.data_folder(out) as folder:
            entries = read_packages(packages)
            docstrings = without_near_duplicates(entries, packages)
            documents, pairs, tasks = assemble(entries, docstrings, core)
            training_text = [text for _, text in documents["train"]]
            training_text += [code for _, code in pairs["stage2/summary-code"]]
            tokenizer = train_tokenizer(training_text, options.vocab_size)
            long, meta = long_documents(docstrings, core), {"inputs": inputs}
            shared.write_folder(folder, tokenizer, PREFIXES, documents, pairs, tasks, long, meta)
    if options.show:
        shared.show_pairs(out, options.show)


def version_of(package):
    try:
        return platform.python_version() if package == "stdlib" else version(package)
    except PackageNotFoundError:
        return "unknown"


def main(arguments):
    prepare(read_options(Options, arguments)[0])


if __name__ == "__main__":
    cli(main)
