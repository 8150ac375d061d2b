"""What each part of the paper adds: tables of runs with one part left out or changed.

    python bench/experiments.py ladder               # the stages, on the embedded documentation
    python bench/experiments.py miniature SOURCES    # the paper in miniature, on public data

A seed takes about 30 and 90 minutes on two cores. OUT/results.json and OUT/report.md are written
after every row, and the same command continues an interrupted one. Scores are nDCG@10, Spearman for
STS, with standard errors over queries, of the mean over seeds; differences are query by query.

miniature: SOURCES has these files. Training rows that repeat a text of the tasks are left out.

    text/wikipedia.jsonl.gz                           {"title", "text"}: stage 1, and openings
    pairs/{arxiv,medquad,stackexchange,tldr}.jsonl.gz {"query", "document"}: stage 2
    folders/{peps,swift-evolution}.tar.gz             reStructuredText, Markdown: stages 1 and 2
    pairs/{questions_wiki,medquad}.jsonl.gz           stage 3; medquad's negatives: same "topic"
    retrieval/{scifact-train,questions-amazon,qmsum-trainval}/    tasks in the BEIR layout, dev
    sts/stsb-en-dev.csv.gz                            a task: sentence, sentence, score
"""

import dataclasses
import itertools
import json
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.stages import STAGES
from common.device import best_device, device_name
from common.files import read_json, read_lines, write_json, write_text
from common.options import InputError, cli, read_options, split_words
from data import filter as consistency
from data import folder, pairs, pydocs
from data.tasks import PREFIXES, read_scored_pairs, write_jsonl, write_task
from evaluate import Retrieval, scalings, shown, spearman, summary
from model import NomicBert


@dataclass(frozen=True)
class Row:
    """One line of a table: a run, or another way to evaluate the model of one."""

    name: str
    stage: str = ""  # mlm, contrastive or finetune; or filter, which makes data
    start: str = ""  # the row whose model it starts from, filters with, or evaluates; empty: BM25
    options: str = ""  # of the stage, beside those of the size
    data: str = ""  # the row whose data it takes; empty: that of the group
    against: str = ""  # the row that it is compared with
    dims: int = 0  # evaluates the first dimensions only; 0: all
    tokens: int = 0  # truncates texts to this length; 0: the trained one, and no more than 512
    scaling: str = "Dynamic NTK"  # of RoPE
    long: bool = False  # in miniature: evaluates on QMSum, whose documents are long


ONE, TWO, THREE = (f"after stage {i}" for i in (1, 2, 3))
NO_ONE, NO_TWO, EASY = "stage 2 without stage 1", "without stage 2", "without hard negatives"
LADDER = [
    Row(ONE, "mlm"),
    Row(TWO, "contrastive", ONE, against=ONE),
    Row(THREE, "finetune", TWO, against=TWO),
    Row(NO_ONE, "contrastive", options="--lr=3e-3", against=TWO),
    Row("without stage 1", "finetune", NO_ONE, against=THREE),
    Row(NO_TWO, "finetune", ONE, against=THREE),
    Row(EASY, "finetune", TWO, "--negatives=0", against=THREE),
    Row("margin 0.95", "finetune", TWO, "--margin=0.95", against=THREE),
    Row("margin inf", "finetune", TWO, "--margin=inf", against=THREE),
]
FILTER, ALL, M = "the filter", "stage 2 without the filter", "--matryoshka"
MINIATURE = [
    Row("BM25", against=THREE),
    Row("random weights", "contrastive", options="--steps=1 --lr=0"),
    Row(ONE, "mlm"),
    Row(ALL, "contrastive", ONE, against=TWO),
    Row(FILTER, "filter", ALL, "--max-tokens=512"),
    Row(TWO, "contrastive", ONE, data=FILTER, against=ONE),
    Row(THREE, "finetune", TWO, M, FILTER, TWO),
    Row(NO_ONE, "contrastive", options="--lr=3e-3", data=FILTER, against=TWO),
    Row("without stage 1", "finetune", NO_ONE, M, FILTER, THREE),
    Row(NO_TWO, "finetune", ONE, M, FILTER, THREE),
    Row(EASY, "finetune", TWO, f"{M} --negatives=0", FILTER, THREE),
    Row("without the filter", "finetune", ALL, M, "", THREE),
    *(Row(f"{THREE}: {n} dimensions", start=THREE, against=THREE, dims=n) for n in (64, 128, 256)),
    Row("BM25 of whole documents", long=True),
]
for n, rope in itertools.product((512, 2048, 4096, 8192), scalings(1)):
    read = {"tokens": n, "scaling": rope, "long": True}
    against = f"{rope}: 2048 tokens" if n != 2048 else ""
    MINIATURE.append(Row(f"{rope}: {n} tokens", start=THREE, against=against, **read))
GROUPS = {"ladder": LADDER, "miniature": MINIATURE}

TINY = "--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --intermediate-size=64"
TINY += " --batch-size=4 --steps=2"
# options of the stages; in miniature also articles of Wikipedia, at most, and words of a tokenizer
SIZES = {"laptop": ("", 4000, 16_384), "gpu": ("--preset=gpu", 100_000, 16_384)}
SIZES["tiny"] = (TINY, 100, 500)
LONGER = "--trained-length=512 --document-tokens=512 --tokens-in-memory=131072"
LONG = {  # in miniature, where texts are longer than those of the documentation
    "mlm": "--seq-len=512 --batch-size=16 --steps=700",
    "contrastive": f"{LONGER} --steps=200",
    "finetune": f"{LONGER} --batch-size=256",
}
TASKS = {"SciFact": "retrieval/scifact-train", "Amazon": "retrieval/questions-amazon"}
TASKS |= {"STS": "sts/stsb-en-dev.csv.gz"}
LONG_TASKS = {"QMSum": "retrieval/qmsum-trainval"}


@dataclass
class Options:
    size: str = "laptop"  # laptop, gpu, or tiny, which shows in a minute that everything runs
    data: str = "out/pydocs"  # the data folder of ladder
    out: str = ""  # for runs and results; empty: out/ and the name of the group
    seeds: int = 1  # how often each row is run
    rows: str = ""  # only rows whose names begin so, with commas, and those that they start from


def run_row(row, seed, group, options):
    """Trains or filters if the row says so, and evaluates. Returns {"scores": task -> values,
    "minutes": of training}."""

    def directory(name):
        return Path(options.out, str(seed), re.sub(r"[^\w.]+", "-", name)) if name else None

    out, start, result = directory(row.name), directory(row.start), {}
    data = directory(row.data) or (f"{options.out}/data" if group == "miniature" else options.data)
    if row.stage == "filter":
        if not out.exists():
            consistency.main([str(data), f"--judge={start}", f"--out={out}", *row.options.split()])
        counts = read_json(out / "meta.json")["filtered"].values()
        kept = sum(n["kept"] for n in counts) / sum(n["rows"] for n in counts)
        return {"scores": {"pairs kept": [kept]}}
    if row.stage:
        arguments = LONG[row.stage].split() if group == "miniature" else []
        arguments += [*SIZES[options.size][0].split(), *row.options.split(), "--eval-every=0"]
        arguments += [f"--data={data}", f"--out={out}", f"--seed={seed}"]
        arguments += [f"--init={start}"] if start else []
        STAGES[row.stage].main(arguments)
        log = [json.loads(line) for line in open(out / "log.jsonl")]
        result["minutes"] = sum(step["tokens"] / step["tokens_per_second"] for step in log) / 60
    return {**result, "scores": evaluate(row, out if row.stage else start, group, options)}


def evaluate(row, checkpoint, group, options):
    """task -> nDCG@10 of each query; of scored pairs a single number, Spearman, which BM25 has not.
    checkpoint: None for BM25."""
    if group == "miniature":
        tasks, split = LONG_TASKS if row.long else TASKS, "dev"
    else:
        folders = sorted(Path(options.data, "retrieval").glob("*/"))
        tasks, split = {path.name: f"retrieval/{path.name}" for path in folders}, "test"
    if checkpoint:
        model = NomicBert.from_pretrained(checkpoint, device=best_device())
        trained, dims = model.config.trained_length, min(row.dims, model.config.hidden_size) or None
        tokens = row.tokens or min(512, trained)
        if tokens > trained:
            model.rope = dataclasses.replace(model.rope, **scalings(tokens / trained)[row.scaling])
    scores = dict.fromkeys(tasks, [])
    for name, path in tasks.items():
        path = Path(options.data, path)
        if path.is_dir():
            task = Retrieval(path, split)
            ranking = task.rank(model, tokens, dims=dims) if checkpoint else task.rank_bm25()
            scores[name] = task.scores(ranking)["nDCG@10"]
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
    _, articles, vocabulary = SIZES[size]
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
        first, second, _ = read_scored_pairs(sources / TASKS["STS"])
        corpus = {str(i): sentence for i, sentence in enumerate(second)}
        queries = {"dev": [(sentence, [str(i)]) for i, sentence in enumerate(first)]}
        write_task(raw / "sts", corpus, queries, ("", ""))

        tasks = (sources / path for path in (*TASKS.values(), *LONG_TASKS.values()))
        held_out = ",".join(str(path) for path in (raw / "sts", *tasks) if path.suffix != ".gz")
        common = [f"--out={raw}/pairs", f"--held-out={held_out}", "--queries=100"]
        weak = [f"{sources}/pairs/{name}.jsonl.gz" for name in ("medquad", "stackexchange", "tldr")]
        weak += [f"{sources}/pairs/arxiv.jsonl.gz:clustering"]
        weak += [f"{raw}/wikipedia.jsonl:classification"]
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
    """Markdown: a table for all rows that are evaluated on the same tasks."""
    machine, tables = f"{device_name(best_device())}, torch {torch.__version__}", {}
    text = f"# {group}\n\nSize {options.size}; {machine}.\n"
    for row in (row for row in GROUPS[group] if row.name in results):
        runs, others = results[row.name], results.get(row.against, {})
        tasks, line = tuple(runs["0"]["scores"]), [row.name]
        for task in tasks:
            line += [cell(runs, task), difference(runs, others, task)]
        minutes = [run["minutes"] for run in runs.values() if "minutes" in run]
        line += [row.against, f"{np.mean(minutes):.1f}" if minutes else ""]
        titles = ["", *(title for task in tasks for title in (task, "difference"))]
        head = [[*titles, "from", "minutes"], ["---", *["---:"] * (len(titles) + 1)]]
        tables.setdefault(tasks, head).append(line)
    for lines in tables.values():
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    group = words[0] if words else ""
    if group not in GROUPS or len(words) != 1 + (group == "miniature"):
        raise InputError("give ladder, or miniature SOURCES")
    if options.size not in SIZES:
        raise InputError(f"--size={options.size}: give {', '.join(SIZES)}")
    options.out = options.out or f"out/{group}"
    options.data = words[1] if group == "miniature" else options.data
    rows, prefixes = GROUPS[group], tuple(options.rows.split(","))
    chosen = {row.name for row in rows if row.name.startswith(prefixes)}
    if not chosen:
        raise InputError(f"--rows={options.rows}: the rows are {', '.join(x.name for x in rows)}")
    for row in reversed(rows):  # and those that they depend on, which stand above them
        chosen |= {row.start, row.data} if row.name in chosen else set()

    path = Path(options.out, "results.json")
    settings = {"group": group, "size": options.size, "data": options.data}
    results = read_json(path) if path.is_file() else {"settings": settings, "rows": {}}
    if results["settings"] != settings:
        raise InputError(f"{path} has results of {results['settings']}: choose another --out")
    if group == "ladder":
        pydocs.make_if_missing(options.data)
    elif not Path(options.out, "data").exists():
        make_data(Path(options.data), Path(options.out, "data"), options.size)
    for seed, row in itertools.product(range(options.seeds), rows):
        runs = results["rows"].get(row.name, {})
        if row.name in chosen and str(seed) not in runs:
            print(f"\n{row.name}, seed {seed}", flush=True)
            results["rows"][row.name] = runs | {str(seed): run_row(row, seed, group, options)}
            write_json(path, results)
            write_text(Path(options.out, "report.md"), report(group, options, results["rows"]))
    print("\n" + report(group, options, results["rows"]))


if __name__ == "__main__":
    cli(main)
