"""What each part of the paper adds: tables of runs with one part left out or changed.

    python bench/experiments.py ladder               # the stages, on the built-in documentation
    python bench/experiments.py miniature SOURCES    # the paper in miniature, on public data

Each run leaves its scores in OUT/scores, and OUT/report.md is written after every row. The same
command continues an interrupted one. Several may run at once, one for each seed; the command with
all seeds then prints the whole table.

Scores are nDCG@10, Spearman for STS, with standard errors over queries, of the mean over seeds.
Differences are query by query.

miniature: SOURCES has these files. Training rows that repeat a text of the tasks are left out.

    text/wikipedia.jsonl.gz                           {"title", "text"}: stage 1, and openings
    pairs/{arxiv,medquad,stackexchange,tldr}.jsonl.gz {"query", "document"}: stage 2
    folders/{peps,swift-evolution}.tar.gz             reStructuredText, Markdown: stages 1 and 2
    pairs/{questions_wiki,medquad}.jsonl.gz           stage 3; medquad's negatives: same "topic"
    retrieval/{scifact-train,questions-amazon,policyqa}/     a task in the BEIR layout, dev
    sts/stsb-en-dev.csv.gz                            a task: sentence, sentence, score
"""

import itertools
import json
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import keep
from bench.stages import STAGES
from common.device import best_device, device_name
from common.files import read_lines, write_text
from common.options import InputError, cli, read_options, split_words
from data import folder, pairs, pydocs
from data.tasks import PREFIXES, read_scored_pairs, write_jsonl, write_task
from evaluate import Retrieval, fuse, shown, spearman, summary
from model import NomicBert


@dataclass(frozen=True)
class Row:
    """One line of a table: a run, or another way to evaluate the model of one."""

    name: str
    stage: str = ""  # mlm, contrastive or finetune
    start: str = ""  # the row whose model it starts from, or evaluates; empty: BM25
    options: str = ""  # of the stage, beside those of the size
    against: str = ""  # the row that it is compared with
    dims: int = 0  # evaluates the first dimensions only; 0: all
    with_bm25: bool = False  # the model and BM25 together


ONE, TWO, THREE = (f"after stage {i}" for i in (1, 2, 3))
NO_ONE, NO_TWO, EASY = "stage 2 without stage 1", "without stage 2", "without hard negatives"
BM25 = Row("BM25", against=THREE)
BOTH = Row(f"{THREE}, with BM25", start=THREE, against=BM25.name, with_bm25=True)
RANDOM = Row("random weights", "contrastive", options="--steps=1 --lr=0")
LADDER = [
    BM25,
    RANDOM,
    Row("word vectors alone", "contrastive", "", "--num-hidden-layers=0 --lr=3e-3", against=TWO),
    Row(ONE, "mlm"),
    Row(TWO, "contrastive", ONE, against=ONE),
    Row(THREE, "finetune", TWO, against=TWO),
    BOTH,
    Row(NO_ONE, "contrastive", options="--lr=3e-3", against=TWO),
    Row("without stage 1", "finetune", NO_ONE, against=THREE),
    Row(NO_TWO, "finetune", ONE, against=THREE),
    Row(EASY, "finetune", TWO, "--negatives=0", against=THREE),
    Row("four negatives", "finetune", TWO, "--negatives=4", against=EASY),
    Row("negatives of the first 100", "finetune", TWO, "--mined=100", against=EASY),
    Row("negatives at a rate of 3e-4", "finetune", TWO, "--lr=3e-4", against=EASY),
    Row("none at a rate of 3e-4", "finetune", TWO, "--lr=3e-4 --negatives=0", against=EASY),
    Row("margin 0.95", "finetune", TWO, "--margin=0.95", against=EASY),
]
M = "--matryoshka"
MINIATURE = [
    BM25,
    RANDOM,
    Row(ONE, "mlm"),
    Row(TWO, "contrastive", ONE, against=ONE),
    Row(THREE, "finetune", TWO, M, against=TWO),
    BOTH,
    Row(NO_ONE, "contrastive", options="--lr=RATE", against=TWO),
    Row("without stage 1", "finetune", NO_ONE, M, against=THREE),
    Row(NO_TWO, "finetune", ONE, M, against=THREE),
    Row(EASY, "finetune", TWO, f"{M} --negatives=0", against=THREE),
    *(Row(f"{THREE}: {n} dimensions", start=THREE, against=THREE, dims=n) for n in (64, 128, 256)),
]
GROUPS = {"ladder": LADDER, "miniature": MINIATURE}

LONGER = "--trained-length=512 --document-tokens=512 --tokens-in-memory=131072"
LARGE = "--num-hidden-layers=4 --hidden-size=384 --num-attention-heads=6 --intermediate-size=1536"
LARGE += " --micro-batch-tokens=65536 --compile"
SMALL = "--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --intermediate-size=64"
SMALL += " --batch-size=4 --steps=2"
SIZES = {  # in miniature: options of each stage; its texts are longer than the documentation's
    "laptop": {
        "mlm": "--seq-len=512 --batch-size=16 --steps=700",
        "contrastive": LONGER,
        "finetune": f"{LONGER} --batch-size=256",
    },
    "gpu": {  # some minutes of an H100
        "mlm": f"{LARGE} --seq-len=512 --batch-size=64 --steps=1500 --lr=1e-3",
        "contrastive": f"{LONGER} {LARGE} --lr=5e-4",
        "finetune": f"{LONGER} {LARGE} --batch-size=256 --lr=2e-4",
    },
    "tiny": dict.fromkeys(STAGES, SMALL),  # shows in a minute that everything runs
}
RATE = {"laptop": "3e-3", "gpu": "1e-3", "tiny": "3e-3"}  # of stage 2 from random weights
ARTICLES, ARXIV = 5000, 50_000  # of Wikipedia and arXiv, at most
TASKS = {"SciFact": "retrieval/scifact-train", "Amazon": "retrieval/questions-amazon"}
TASKS |= {"PolicyQA": "retrieval/policyqa", "STS": "sts/stsb-en-dev.csv.gz"}


@dataclass
class Options:
    size: str = "laptop"  # laptop, gpu (miniature only), or tiny
    data: str = "out/pydocs"  # the data folder of ladder
    split: str = "test"  # of ladder: test, or dev while tuning
    out: str = ""  # for runs and results; empty: out/ and the name of the group
    seeds: str = "0"  # a run of each row for each of these, with commas
    options: str = ""  # more options for every stage, such as "--micro-batch-tokens=65536"
    rows: str = ""  # only rows whose names begin so, with commas, and those that they start from


FREE = ("out", "seeds", "rows")  # that do not decide what a row is


def slug(name):
    """The name of a row as the name of a file."""
    return re.sub(r"[^\w.]+", "-", name)


def run_row(row, seed, group, options):
    """Trains if the row says so, and evaluates. Returns {"scores": task -> values, "on": the
    machine, "minutes": of training}."""

    def directory(name):
        return Path(options.out, seed, slug(name)) if name else None

    out, start, result = directory(row.name), directory(row.start), {}
    data = f"{options.out}/data" if group == "miniature" else options.data
    if row.stage:
        sized = group == "miniature" or options.size == "tiny"
        arguments = SIZES[options.size][row.stage].split() if sized else []
        arguments += [*row.options.replace("RATE", RATE[options.size]).split(), "--eval-every=0"]
        arguments += [f"--data={data}", f"--out={out}", f"--seed={seed}", *options.options.split()]
        arguments += [f"--init={start}"] if start else []
        STAGES[row.stage].main(arguments)
        log = [json.loads(line) for line in open(out / "log.jsonl")]
        result["minutes"] = sum(step["tokens"] / step["tokens_per_second"] for step in log) / 60
    result["on"] = f"{device_name(best_device())}, torch {torch.__version__}"
    return {**result, "scores": evaluate(row, out if row.stage else start, group, options)}


def evaluate(row, checkpoint, group, options):
    """task -> nDCG@10 of each query; of scored pairs a single number, Spearman, which BM25 has not.
    checkpoint: None for BM25."""
    if group == "miniature":
        tasks, split = TASKS, "dev"
    else:
        folders = sorted(p for p in Path(options.data, "retrieval").glob("*") if p.is_dir())
        tasks, split = {path.name: f"retrieval/{path.name}" for path in folders}, options.split
    if checkpoint:
        model = NomicBert.from_pretrained(checkpoint, device=best_device())
        dims = min(row.dims, model.config.hidden_size) or None
        tokens = min(512, model.config.trained_length)
    scores = dict.fromkeys(tasks, [])
    for name, path in tasks.items():
        path = Path(options.data, path)
        if path.is_dir():
            task, rankings = Retrieval(path, split), []
            if checkpoint:
                rankings.append(task.rank(model, tokens, dims=dims))
            if row.with_bm25 or not checkpoint:
                rankings.append(task.rank_bm25())
            scores[name] = task.scores(fuse(rankings))["nDCG@10"]
        elif checkpoint:
            *sides, right = read_scored_pairs(path)
            prefixed = ([PREFIXES["classification"] + text for text in side] for side in sides)
            x, y = (model.encode(texts, tokens, dims) for texts in prefixed)
            scores[name] = [spearman((x * y).sum(1), right)]
    return scores


def same_topic(rows):
    """Gives rows up to 7 negatives, answers to other questions on the same topic. Rows whose topic
    has no other answer are left out."""
    rng, topics = np.random.default_rng(0), {}
    for row in rows:
        topics.setdefault(row["topic"], set()).add(row["document"])
    for row in rows:
        if others := sorted(topics[row["topic"]] - {row["document"]}):
            pair = {"query": row["query"], "document": row["document"]}
            yield pair | {"negatives": rng.permutation(others)[:7].tolist()}


def make_data(sources, out, size):
    """Writes the data folder `out` of miniature from SOURCES."""
    articles, arxiv, vocabulary = (100, 100, 500) if size == "tiny" else (ARTICLES, ARXIV, 16_384)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as raw:
        raw, lines = Path(raw), read_lines(sources / "text/wikipedia.jsonl.gz")
        chosen = [json.loads(line) for _, line in itertools.islice(lines, articles)]
        write_jsonl(raw / "text.jsonl", ({"text": f"{x['title']}\n\n{x['text']}"} for x in chosen))
        openings = []
        for article in chosen:  # title and first sentence -> the text after it
            opening, _, rest = article["text"].partition(". ")
            openings.append({"query": f"{article['title']}: {opening}.", "document": rest[:3000]})
        write_jsonl(raw / "wikipedia.jsonl", openings)
        medquad = [json.loads(line) for _, line in read_lines(sources / "pairs/medquad.jsonl.gz")]
        write_jsonl(raw / "medquad-topics.jsonl", same_topic(medquad))
        titles = itertools.islice(read_lines(sources / "pairs/arxiv.jsonl.gz"), arxiv)
        write_jsonl(raw / "arxiv.jsonl", (json.loads(line) for _, line in titles))
        first, second, _ = read_scored_pairs(sources / TASKS["STS"])
        corpus = {str(i): sentence for i, sentence in enumerate(second)}
        queries = {"dev": [(sentence, [str(i)]) for i, sentence in enumerate(first)]}
        write_task(raw / "sts", corpus, queries, ("", ""))

        tasks = (raw / "sts", *(sources / path for path in TASKS.values()))
        held_out = ",".join(str(path) for path in tasks if path.suffix != ".gz")
        common = [f"--out={raw}/pairs", f"--held-out={held_out}", "--queries=100"]
        weak = [f"{sources}/pairs/{name}.jsonl.gz" for name in ("medquad", "stackexchange", "tldr")]
        weak += [f"{raw}/arxiv.jsonl:clustering", f"{raw}/wikipedia.jsonl:classification"]
        supervised = f"{raw}/medquad-topics.jsonl,{sources}/pairs/questions_wiki.jsonl.gz"
        common += [f"--text={raw}/text.jsonl", f"--vocab-size={vocabulary}"]
        pairs.main([*weak, f"--stage3={supervised}", *common])
        before = raw / "pairs"
        for name in ("peps", "swift-evolution"):
            with tarfile.open(sources / f"folders/{name}.tar.gz") as archive:
                archive.extractall(raw / "text", filter="data")
            how = [f"--out={raw}/with-{name}", f"--add={before}", f"--held-out={held_out}"]
            folder.main([f"{raw}/text/{name}", *how])
            before = raw / f"with-{name}"
        for headings in before.glob("stage3/heading-section*"):
            shutil.rmtree(headings)  # stage 3 is for questions that people asked
        before.rename(out)


def cell(runs, task):
    """The mean over seeds; with several, the mean of each in brackets. runs: seed -> result."""
    values = [run["scores"][task] for run in runs.values() if run["scores"].get(task)]
    each = f" ({', '.join(f'{np.mean(v):.3f}' for v in values)})" if len(values) > 1 else ""
    return shown(summary(np.mean(values, axis=0))) + each if values else ""


def difference(runs, others, task):
    """Query by query, in the mean over the seeds that both rows have."""
    both = [(runs[s]["scores"], others[s]["scores"]) for s in runs if s in others]
    found = [np.subtract(x[task], y[task]) for x, y in both if x.get(task) and y.get(task)]
    score = shown(summary(np.mean(found, axis=0))) if found else ""
    return f"+{score}" if score[:1].isdigit() else score


def report(group, options, results):
    """A Markdown table. results: row -> seed -> what run_row returned."""
    machines = {run["on"] for runs in results.values() for run in runs.values()}
    text, lines = f"# {group}\n\nSize {options.size}; {'; '.join(sorted(machines))}.\n\n", []
    for row in (row for row in GROUPS[group] if row.name in results):
        runs, others = results[row.name], results.get(row.against, {})
        tasks, line = list(next(iter(runs.values()))["scores"]), [row.name]
        for task in tasks:
            line += [cell(runs, task), difference(runs, others, task)]
        minutes = [run["minutes"] for run in runs.values() if "minutes" in run]
        line += [row.against, f"{np.mean(minutes):.1f}" if minutes else ""]
        lines.append(line)
    titles = ["", *(title for task in tasks for title in (task, "difference")), "from", "minutes"]
    head = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    return text + "".join(f"| {' | '.join(line)} |\n" for line in [*head, *lines])


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    group = words[0] if words else ""
    if group not in GROUPS or len(words) != 1 + (group == "miniature"):
        raise InputError("give ladder, or miniature SOURCES")
    if options.size not in SIZES:
        raise InputError(f"--size={options.size}: give {', '.join(SIZES)}")
    if group == "ladder" and options.size == "gpu":
        raise InputError("ladder has the sizes laptop and tiny; for others give --options=")
    options.out = options.out or f"out/{group}"
    options.data = words[1] if group == "miniature" else options.data
    rows, prefixes = GROUPS[group], tuple(options.rows.split(","))
    chosen = {row.name for row in rows if row.name.startswith(prefixes)}
    if not chosen:
        raise InputError(f"--rows={options.rows}: the rows are {', '.join(x.name for x in rows)}")
    for row in reversed(rows):  # and those that they depend on, which stand above them
        chosen |= {row.start} if row.name in chosen else set()

    settings = {key: value for key, value in asdict(options).items() if key not in FREE}
    if (before := keep(Path(options.out, "settings.json"), lambda: settings)) != settings:
        raise InputError(f"{options.out} has results of {before}: choose another --out")
    if group == "ladder":
        pydocs.make_if_missing(options.data)
    elif not Path(options.out, "data").exists():
        make_data(Path(options.data), Path(options.out, "data"), options.size)
    results = {}
    for seed, row in itertools.product(options.seeds.split(","), rows):
        if row.name in chosen:
            print(f"\n{row.name}, seed {seed}", flush=True)
            path = Path(options.out, "scores", f"{slug(row.name)}-{seed}.json")
            run = keep(path, lambda row=row, seed=seed: run_row(row, seed, group, options))
            results.setdefault(row.name, {})[seed] = run
            write_text(Path(options.out, "report.md"), report(group, options, results))
    print("\n" + report(group, options, results))


if __name__ == "__main__":
    cli(main)
