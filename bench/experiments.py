"""What each stage adds: tables of runs with one part left out or changed, over several seeds.

    python bench/experiments.py --seeds=0,1,2        # the ladder
    python bench/experiments.py --rows="stage 3"     # some rows, and those that they start from
    python bench/experiments.py lesson --seeds=0,1,2        # what each stage of the paper brings
    python bench/experiments.py curve                # is stage 1 worth it? a table, OUT/curve.png

Scores are nDCG@10, the mean over seeds with its standard error over queries. Differences are taken
query by query; "seeds ±" is their standard deviation over seeds. One counts if it is large beside
both: equal runs end apart where sums are taken in another order. Scores are kept in OUT/scores, so
the same command continues an interrupted one, and several may run at once, one for each seed.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.speed import STAGES, print_table, whole_numbers
from common.device import best_device
from common.files import fingerprint, read_json, read_json_lines, write_json
from common.options import InputError, cli, read_options, split_words
from common.plots import plt, save_figure
from evaluate import fuse
from metrics import Retrieval, shown, summary
from model import NomicBert


@dataclass(frozen=True)
class Row:
    """One line of a table: a run, or another way to rank."""

    name: str
    stage: str = ""  # mlm, contrastive or finetune; empty: nothing is trained
    start: str = ""  # the row whose checkpoint it starts from, or ranks with; empty: none
    options: str = ""  # of the stage, beside its defaults
    against: str = ""  # the row that it is compared with
    bm25: str = ""  # plain or split (identifiers): ranks by BM25, alone or fused with the model
    once: bool = False  # trained with seed 0 alone, from which all seeds go on


TWO, THREE = "after stage 2", "after stage 3"
EASY, SPLIT = "--negatives=0", "BM25, identifiers split"  # the demo mines no hard negatives
LADDER = [
    Row("BM25", bm25="plain"),
    Row(SPLIT, bm25="split"),
    Row("random weights", "contrastive", options="--steps=1 --lr=0"),
    Row("word vectors alone", "contrastive", options="--num-hidden-layers=0"),
    Row(TWO, "contrastive", against="word vectors alone"),
    Row(THREE, "finetune", TWO, EASY, against=TWO),
    Row(f"{THREE}, with BM25", start=THREE, bm25="split", against=SPLIT),
    Row("stage 3 without stage 2", "finetune", "", f"{EASY} --lr=3e-3", against=THREE),
]

# The paper's order: a long stage 1, then weak pairs, then supervised ones. Two layers.
LONG, WEAK, BEST = "8000 steps of stage 1", "then stage 2", "then stage 3"
DEEP = "--num-hidden-layers=2"
FEW = "--pairs=3000 --batch-size=256 --steps=80 --warmup=8"
TUNED = f"--pairs=3000 --batch-size=256 --steps=40 --warmup=4 --lr=3e-4 {EASY}"
LESSON = [
    Row(LONG, "mlm", options="--steps=8000 --warmup=480 --save-every=1000", once=True),
    Row(WEAK, "contrastive", LONG, f"{FEW} --lr=3e-4", against=LONG),
    Row(BEST, "finetune", WEAK, TUNED, against=WEAK),
    Row("stage 2 without stage 1", "contrastive", "", f"{FEW} {DEEP} --lr=1e-3", against=WEAK),
    Row("stage 3 without stage 1", "finetune", "stage 2 without stage 1", TUNED, against=BEST),
    Row("stage 3 after stage 1 without 2", "finetune", LONG, TUNED, against=BEST),
    Row("stage 3 with four hard negatives", "finetune", WEAK, f"{TUNED} --negatives=4",
        against=BEST),
    Row("one layer without stage 1 for twice the steps", "contrastive", "", f"{FEW} --lr=1e-3 "
        "--steps=160 --warmup=16", against="stage 2 without stage 1"),
]  # fmt: skip

# What stage 1 is worth with more and more pairs. Of 3,000 pairs the lesson has both rows.
SIZES = {  # pairs -> how they are trained on, learning rate from random weights
    500: ("--batch-size=256 --steps=40 --warmup=4", "3e-4"),
    15_000: ("--batch-size=256 --steps=200 --warmup=20", "1e-3"),
    131_000: ("--batch-size=512 --steps=200 --warmup=20", "3e-3"),
}
CURVE = {3000: ("stage 2 without stage 1", WEAK)}  # pairs -> names of both rows
CURVE |= {pairs: (f"{pairs} pairs", f"{pairs} pairs after stage 1") for pairs in SIZES}


def curve_rows():
    """Stage 2 on more and more pairs, from random weights and after stage 1."""
    yield from (row for row in LESSON if row.name in CURVE[3000])
    for pairs, (how, rate) in SIZES.items():
        (fresh, after), options = CURVE[pairs], f"--pairs={pairs} {how}"
        yield Row(fresh, "contrastive", options=f"{options} {DEEP} --lr={rate}")
        yield Row(after, "contrastive", LONG, f"{options} --lr=3e-4", against=fresh)


TABLES = {"ladder": LADDER, "lesson": LESSON, "curve": [*curve_rows()]}
ROWS = {row.name: row for rows in TABLES.values() for row in rows}


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    split: str = "test"  # dev is for tuning [dev, test]
    out: str = "out/experiments"  # for runs and scores; another one for other options
    seeds: str = "0"  # a run of each row for each of these, with commas
    options: str = ""  # more options for every stage, such as "--micro-batch-tokens=65536"
    rows: str = ""  # only rows whose names begin so, and those that they start from; with commas


def with_starts(row):
    """The rows that a row starts from, the first one first, and the row."""
    return [*with_starts(ROWS[row.start]), row] if row.start else [row]


def run_of(row, seed, options):
    """The directory of a row's run."""
    return Path(options.out, str(0 if row.once else seed), re.sub(r"\W+", "-", row.name))


def run_row(row, seed, options):
    """Trains if the row says so, and ranks. Returns {"minutes": of training, "scores": task ->
    nDCG@10 of each query}, which is kept in a file for these settings."""
    settings = [fingerprint(Path(options.data, "meta.json")), options.split, options.options]
    settings += [(other.stage, other.options, other.bm25) for other in with_starts(row)]
    key = fingerprint(json.dumps(settings).encode())
    seed, out = 0 if row.once else seed, run_of(row, seed, options)
    path = Path(options.out, "scores", f"{out.name}-{seed}-{key}.json")
    if path.is_file():
        return read_json(path)
    model, minutes, scores = None, 0, {}
    start = run_of(ROWS[row.start], seed, options) if row.start else None
    if row.stage:
        arguments = [f"--data={options.data}", f"--out={out}", f"--seed={seed}", "--eval-every=0"]
        arguments += [f"--init={start}"] if start else []
        STAGES[row.stage].main([*arguments, *row.options.split(), *options.options.split()])
        log = [record for _, record in read_json_lines(out / "log.jsonl")]
        minutes = sum(record["tokens"] / record["tokens_per_second"] for record in log) / 60
    if row.stage or start:
        checkpoint = out if row.stage else start
        model = NomicBert.from_pretrained(checkpoint, device=best_device())
    for task in Retrieval.open_all(options.data, options.split):
        rankings = [task.rank_bm25(split_identifiers=row.bm25 == "split")] if row.bm25 else []
        rankings += [task.rank(model, model.config.trained_length)] if model else []
        scores[task.name] = task.scores(fuse(rankings))["nDCG@10"]
    write_json(path, {"minutes": minutes, "scores": scores})
    return {"minutes": minutes, "scores": scores}


def mean_score(runs, task):
    """summary() of the mean over seeds. runs: seed -> what run_row returned."""
    return summary(np.mean([run["scores"][task] for run in runs.values()], axis=0))


def difference(runs, others, task):
    """Query by query, over the seeds that both rows have."""
    both = [(runs[s]["scores"][task], others[s]["scores"][task]) for s in runs if s in others]
    if not both:
        return ""
    differences = np.array([np.subtract(*pair) for pair in both])  # (seeds, queries)
    score = summary(differences.mean(0))
    seeds = f" (seeds ±{differences.mean(1).std(ddof=1):.3f})" if len(both) > 1 else ""
    return ("+" if score["mean"] > 0 else "") + shown(score) + seeds


def table_of(results, tasks):
    """Yields the head and the rows. results: name of a row -> seed -> what run_row returned."""
    yield "", *(title for task in tasks for title in (task, "difference")), "from", "minutes"
    for name, runs in results.items():
        row, others, cells = ROWS[name], results.get(ROWS[name].against, {}), [name]
        for task in tasks:
            cells += [shown(mean_score(runs, task)), difference(runs, others, task)]
        minutes = np.mean([run["minutes"] for run in runs.values()])
        yield *cells, row.against if others else "", f"{minutes:.1f}" if row.stage else ""


def draw_curve(results, tasks):
    """Scores against the number of pairs, from random weights and after stage 1."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.4), squeeze=False)
    sizes = sorted(pairs for pairs in CURVE if set(CURVE[pairs]) <= set(results))
    for axis, task in zip(axes[0], tasks, strict=True):
        for line, label in enumerate(("random weights", f"after {LONG}")):
            scores = [mean_score(results[CURVE[pairs][line]], task) for pairs in sizes]
            mean, error = ([score[key] for score in scores] for key in ("mean", "error"))
            axis.errorbar(sizes, mean, error, label=label, marker="o", ms=3, capsize=2)
        axis.set(title=task.replace("-", " → "), ylabel="nDCG@10, held-out modules", ylim=(0, None))
        axis.set(xscale="log", xlabel="pairs of stage 2")
        axis.set_xticks(sizes, [f"{pairs:,}" for pairs in sizes], fontsize=7)
        axis.minorticks_off()
    axes[0][0].legend(fontsize=8)
    return figure


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    table = " ".join(words) or "ladder"
    if table not in TABLES:
        raise InputError(f"{table}: the tables are {', '.join(TABLES)}")
    names, parts = [row.name for row in TABLES[table]], options.rows.split(",")
    for part in parts:
        if not any(name.startswith(part) for name in names):
            raise InputError(f"--rows={part}: the rows are {', '.join(names)}")
    chosen = [row for row in TABLES[table] if row.name.startswith(tuple(parts))]
    for task in Retrieval.open_all(options.data, options.split):
        print(task.about)
    results = {row.name: {} for end in chosen for row in with_starts(end)}
    for seed in whole_numbers("--seeds", options.seeds, least=0):
        for name, runs in results.items():
            print(f"\n{name}, seed {seed}", flush=True)
            runs[seed] = run_row(ROWS[name], seed, options)
    tasks = list(runs[seed]["scores"])
    print_table(options.split, f"seeds {options.seeds}", rows=table_of(results, tasks))
    if table == "curve":
        save_figure(draw_curve(results, tasks), Path(options.out, "curve.png"))


if __name__ == "__main__":
    cli(main)
