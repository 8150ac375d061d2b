"""The data folder of the paper in miniature: public data -> arrays of tokens (bench/miniature.py).

    python bench/miniature_data.py SOURCES               # writes out/miniature/data

stage 1    Wikipedia's articles, packed; and the two folders' text
stage 2    arXiv title -> abstract; question -> answer (MedQuAD, StackExchange); what a command
           does -> the command (tldr); an article's title and first sentence -> the rest;
           headings -> sections, title -> text, first paragraph -> the rest (Python's and Swift's
           proposals). A batch is from one source, with the prefixes that the paper gives its like
stage 3    people's questions -> Wikipedia's paragraphs, with negatives that stage 3 mines (other
           paragraphs of the article are among the nearest); health questions -> answers (MedQuAD),
           with answers to other questions on the same topic as negatives
never      claims -> abstracts (SciFact); questions -> reviews (Amazon); pairs of sentences (STS
           Benchmark, dev); questions -> meetings of 9,000 words (QMSum). Rows that repeat their
           text are left out, and counted
"""

import gzip
import itertools
import json
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import folder, jsonl
from data.prepare import write_retrieval
from options import InputError, read_options, run
from similarity import read_pairs

TASKS = {"SciFact": "scifact-train", "Amazon": "questions-amazon", "QMSum": "qmsum-trainval"}
STS = "sts/stsb-en-dev.csv.gz"
SHOULD_BE_THERE = [  # in SOURCES
    "text/wikipedia.jsonl.gz",
    *(f"pairs/{name}.jsonl.gz" for name in ("arxiv", "medquad", "stackexchange", "tldr")),
    "pairs/questions_wiki.jsonl.gz",
    *(f"folders/{name}.tar.gz" for name in ("peps", "swift-evolution")),
    *(f"retrieval/{name}" for name in TASKS.values()),
    STS,
]


@dataclass
class Options:
    out: str = "out/miniature"  # the data goes to OUT/data, and what it is made of beside it
    articles: int = 100_000  # of Wikipedia, at most
    vocab_size: int = 16_384  # of the tokenizer that is trained on all this text


def check_sources(words):
    """The folder that is given. Raises InputError naming what it lacks."""
    if len(words) != 1:
        raise InputError("give the folder with the public data: bench/miniature.sh lists its files")
    for name in SHOULD_BE_THERE:
        if not Path(words[0], name).exists():
            raise InputError(f"{words[0]} has no {name}: bench/miniature.sh lists what it needs")
    return Path(words[0])


def rows_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def opening_and_rest(article, longest=3000):
    """Title and first sentence -> what follows (at most so many characters), of an article."""
    opening, _, rest = article["text"].partition(". ")
    return {"query": f"{article['title']}: {opening}.", "document": rest[:longest]}


def same_topic(rows, seed=0, n=7):
    """Rows with up to n negatives: answers to other questions on the same topic. Rows whose topic
    has no other answer are left out."""
    rng, topics = np.random.default_rng(seed), {}
    for row in rows:
        topics.setdefault(row["topic"], []).append(row)
    for row in rows:
        others = {other["document"] for other in topics[row["topic"]]} - {row["document"]}
        if others:
            chosen = rng.permutation(sorted(others))[:n].tolist()
            yield {"query": row["query"], "document": row["document"], "negatives": chosen}


def write_sentences(out, path):
    """Pairs of sentences as a retrieval task, so that training rows that repeat one are found."""
    first, second, _ = read_pairs(path)
    corpus = {str(i): sentence for i, sentence in enumerate(second)}
    queries = {"dev": [(sentence, str(i)) for i, sentence in enumerate(first)]}
    write_retrieval(out, corpus, queries, ("", ""))


def prepare(source, out, articles, vocab_size):
    """Writes OUT/data from the folder of public data, unless it is there. Returns its path."""
    final, made = out / "data", [out / name for name in ("raw", "pairs", "with-peps", "with-swift")]
    if final.is_dir():
        return final
    for left_over in made:
        shutil.rmtree(left_over, ignore_errors=True)
    raw, prepared, with_peps, with_swift = made
    raw.mkdir(parents=True)
    chosen = list(itertools.islice(rows_of(source / "text" / "wikipedia.jsonl.gz"), articles))
    write_rows(raw / "text.jsonl", ({"text": f"{a['title']}\n\n{a['text']}"} for a in chosen))
    write_rows(raw / "wikipedia.jsonl", map(opening_and_rest, chosen))
    medquad = list(rows_of(source / "pairs" / "medquad.jsonl.gz"))
    write_rows(raw / "medquad-topics.jsonl", same_topic(medquad))
    write_sentences(raw / "sts", source / STS)

    def pairs(name):
        return str(source / "pairs" / f"{name}.jsonl.gz")

    held_out = [*(source / "retrieval" / name for name in TASKS.values()), raw / "sts"]
    held_out = f"--held-out={','.join(map(str, held_out))}"
    few = "--queries=100"  # of each source, held out: their documents are stage 1's dev text
    weak = [pairs("medquad"), pairs("stackexchange"), pairs("tldr"), f"{pairs('arxiv')}:clustering"]
    weak += [f"{raw / 'wikipedia.jsonl'}:classification", f"--text={raw / 'text.jsonl'}"]
    supervised = [str(raw / "medquad-topics.jsonl"), pairs("questions_wiki"), "--stage=3"]
    common = [f"--out={prepared}", held_out, few]
    jsonl.main([*weak, f"--vocab-size={vocab_size}", *common])
    jsonl.main([*supervised, *common])

    steps = (("peps", prepared, with_peps), ("swift-evolution", with_peps, with_swift))
    for name, before, after in steps:
        with tempfile.TemporaryDirectory() as unpacked:
            with tarfile.open(source / "folders" / f"{name}.tar.gz") as archive:
                archive.extractall(unpacked, filter="data")
            folder.main([f"{unpacked}/{name}", f"--out={after}", f"--add={before}", held_out])
    for weak_sections in with_swift.glob("stage3/heading-section*"):
        shutil.rmtree(weak_sections)  # nobody asked these: stage 3 is for what people did ask
    shutil.rmtree(with_swift / "stage1" / "dev")  # text of one folder; this is of all the others:
    shutil.copytree(prepared / "stage1" / "dev", with_swift / "stage1" / "dev")
    return with_swift.rename(final)


def main(arguments):
    words = [argument for argument in arguments if not argument.startswith("--")]
    options, _ = read_options(Options, [a for a in arguments if a.startswith("--")])
    source, out = check_sources(words), Path(options.out)
    print(f"the data is in {prepare(source, out, options.articles, options.vocab_size)}")


if __name__ == "__main__":
    run(main)
