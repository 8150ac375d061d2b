"""What each stage adds: a table of runs with one part left out or changed, over several seeds.

    python bench/experiments.py --seeds=0,1,2
    python bench/experiments.py --seeds=0 --rows="stage 3"    # and the rows that they start from

Each run leaves its scores in OUT/scores: the same command continues an interrupted one, and several
may run at once, one for each seed. Scores are nDCG@10 with standard errors over queries, of the
mean over seeds; differences are query by query.
"""

import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import shared
from bench.stages import STAGES
from common.device import best_device
from common.files import read_json_lines
from common.options import InputError, cli, read_options
from data import pydocs
from evaluate import Retrieval, fuse, shown, summary
from model import NomicBert


@dataclass(frozen=True)
class Row:
    """One line of the table: a run, or another way to rank."""

    name: str
    stage: str = ""  # mlm, contrastive or finetune; empty: nothing is trained
    start: str = ""  # the row whose model it starts from, or ranks with; empty: none
    options: str = ""  # of the stage, beside its defaults
    against: str = ""  # the row that it is compared with
    bm25: bool = False  # ranks by BM25, alone or together with the model


ONE, TWO, THREE = (f"after stage {i}" for i in (1, 2, 3))
NO_ONE, EASY = "stage 2 without stage 1", "stage 3 without hard negatives"
LOW = "--lr=3e-4"
ROWS = [
    Row("BM25", bm25=True, against=THREE),
    Row("random weights", "contrastive", options="--steps=1 --lr=0"),
    Row("word vectors alone", "contrastive", options="--num-hidden-layers=0 --lr=3e-3"),
    Row(ONE, "mlm"),
    Row(TWO, "contrastive", ONE, against=ONE),
    Row(THREE, "finetune", TWO, against=TWO),
    Row(f"{THREE}, with BM25", start=THREE, bm25=True, against="BM25"),
    Row(NO_ONE, "contrastive", options="--lr=3e-3", against=TWO),
    Row("stage 3 without stage 1", "finetune", NO_ONE, against=THREE),
    Row("stage 3 without stage 2", "finetune", ONE, against=THREE),
    Row(EASY, "finetune", TWO, "--negatives=0", against=THREE),
    Row("stage 3 with four negatives", "finetune", TWO, "--negatives=4", against=EASY),
    Row("stage 3, negatives of the first 100", "finetune", TWO, "--mined=100", against=EASY),
    Row("stage 3, margin 0.95", "finetune", TWO, "--margin=0.95", against=EASY),
    Row("stage 3 at a rate of 3e-4", "finetune", TWO, LOW, against=EASY),
    Row(f"{EASY}, at a rate of 3e-4", "finetune", TWO, f"{LOW} --negatives=0", against=EASY),
]


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    split: str = "test"  # test, or dev while tuning
    out: str = "out/experiments"  # for runs and scores; another one for other options
    seeds: str = "0"  # a run of each row for each of these, with commas
    options: str = ""  # more options for every stage, such as "--micro-batch-tokens=65536"
    rows: str = ""  # only rows whose names begin so, and those that they need; with commas


def slug(name):
    """The name of a row as the name of a file."""
    return re.sub(r"\W+", "-", name)


def run_row(row, seed, options):
    """Trains if the row says so. Returns {"minutes": of training, "scores": task -> nDCG@10 of each
    query}."""
    out, start = (Path(options.out, seed, slug(name)) for name in (row.name, row.start))
    minutes = None
    if row.stage:
        given = [f"--data={options.data}", f"--out={out}", f"--seed={seed}", "--eval-every=0"]
        given += [f"--init={start}"] if row.start else []
        STAGES[row.stage].main([*given, *row.options.split(), *options.options.split()])
        log = [record for _, record in read_json_lines(out / "log.jsonl")]
        minutes = sum(record["tokens"] / record["tokens_per_second"] for record in log) / 60
    tasks, rankings = Retrieval.open_all(options.data, options.split), []
    if row.bm25:
        rankings.append([task.rank_bm25() for task in tasks])
    if row.stage or row.start:
        model = NomicBert.from_pretrained(out if row.stage else start, device=best_device())
        rankings.append([task.rank(model, model.config.trained_length) for task in tasks])
    scores = {
        task.name: task.scores(fuse(found))["nDCG@10"]
        for task, found in zip(tasks, zip(*rankings, strict=True), strict=True)
    }
    return {"minutes": minutes, "scores": scores}


def mean_score(runs, task):
    """The mean over seeds. runs: seed -> what run_row returned."""
    return shown(summary(np.mean([run["scores"][task] for run in runs.values()], axis=0)))


def difference(runs, others, task):
    """Query by query, in the mean over the seeds that both rows have."""
    both = [(runs[s]["scores"][task], others[s]["scores"][task]) for s in runs if s in others]
    if not both:
        return ""
    found = summary(np.mean([np.subtract(*pair) for pair in both], axis=0))
    return ("+" if found["mean"] > 0 else "") + shown(found)


def print_table(results, options):
    shared.print_machine(f"seeds {options.seeds}")
    tasks = list(next(iter(next(iter(results.values())).values()))["scores"])
    titles = [title for task in tasks for title in (task, "difference")]
    shared.print_head("", *titles, "from", "minutes")
    for row in (row for row in ROWS if row.name in results):
        runs, others = results[row.name], results.get(row.against, {})
        cells = []
        for task in tasks:
            cells += [mean_score(runs, task), difference(runs, others, task)]
        minutes = [run["minutes"] for run in runs.values()] if row.stage else []
        shared.print_row(
            row.name, *cells, row.against, f"{np.mean(minutes):.1f}" if minutes else ""
        )


def main(arguments):
    options, _ = read_options(Options, arguments)
    chosen = {row.name for row in ROWS if row.name.startswith(tuple(options.rows.split(",")))}
    if not chosen:
        raise InputError(f"--rows={options.rows}: the rows are {', '.join(x.name for x in ROWS)}")
    for row in reversed(ROWS):  # and those that they start from, which stand above them
        chosen |= {row.start} if row.name in chosen else set()
    pydocs.make_if_missing(options.data)
    shared.keep_settings(options.out, options.data, options.split, options.options)
    results = {}  # row -> seed -> what run_row returned
    for seed in map(str, shared.whole_numbers(options.seeds)):
        for row in (row for row in ROWS if row.name in chosen):
            print(f"\n{row.name}, seed {seed}", flush=True)
            path = Path(options.out, "scores", f"{slug(row.name)}-{seed}.json")
            run = shared.keep(path, partial(run_row, row, seed, options))
            results.setdefault(row.name, {})[seed] = run
    print_table(results, options)


if __name__ == "__main__":
    cli(main)
