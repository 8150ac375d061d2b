"""Does consistency filtering find bad pairs, and with which judge? Bad pairs are planted.

    python bench/judges.py                     # a judge that was trained on the pairs themselves
    python bench/judges.py --judges=st:DIR     # and another one beside it, such as the paper's

Draws pairs from all sources of stage 2, and gives a fifth of them the document of another pair of
the same source. Stage 2 is trained from random weights on all of them; the model that comes out is
the first judge. Each judge filters the pairs (data/filter.py). Then stage 2 is trained on what each
judge keeps, and on the good pairs alone. Scores are nDCG@10 on test with standard errors over
queries, of the mean over seeds; the difference from all pairs is query by query. Each run leaves
its scores in OUT: the same command continues an interrupted one.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
from bench.shared import print_head, print_machine, print_row, train_and_score
from common.device import best_device
from common.files import load_tokenizer, read_json_lines
from common.options import cli, read_options
from data import filter as consistency
from data.prepare import data_folder, write_source
from data.store import open_sources
from evaluate import shown, summary


@dataclass
class Options:
    judges: str = ""  # further judges: checkpoints, or st:NAME, with commas
    data: str = "out/pydocs"  # a data folder
    out: str = "out/judges"  # for data, runs and scores
    pairs: int = 10_000  # drawn from all sources of stage 2
    planted: float = 0.2  # share of them that get a wrong document [0.01, 0.9]
    seeds: str = "0"  # of training, with commas
    options: str = "--steps=100 --lr=3e-3"  # of contrastive.py


def draw(options):
    """source -> (queries (n,), documents (n,), which documents are planted (n,))."""
    drawn, sources = {}, open_sources(f"{options.data}/stage2", load_tokenizer(options.data))
    share = min(1, options.pairs / sum(map(len, sources)))
    for source in sources:
        rows = read_json_lines(Path(options.data, "stage2", source.name, "pairs.jsonl"))
        rows, rng = [row for _, row in rows], np.random.default_rng(0)
        chosen = rng.permutation(len(rows))[: round(share * len(rows))]
        planted = rng.random(len(chosen)) < options.planted
        query, document = (
            np.array([rows[i][side] for i in chosen], object) for side in ("query", "document")
        )
        planted &= planted.sum() > 1  # one alone would keep its own document
        document[planted] = np.roll(document[planted], 1)
        drawn[source.name] = query, document, planted
    return drawn


def write(options, out, drawn):
    """Writes the data folder `out` with these pairs as its stage 2."""
    if out.exists():
        return
    with data_folder(out) as new:
        consistency.copy_data(options.data, new, {options.data: ["stage2"]})
        tokenizer = load_tokenizer(options.data)
        for source in open_sources(f"{options.data}/stage2", tokenizer):
            query, document, _ = drawn[source.name]
            columns = {"query": query.tolist(), "document": document.tolist()}
            write_source(new / "stage2" / source.name, columns, source.meta["prefixes"], tokenizer)


def kept_rows(folder, drawn):
    """Which of all drawn pairs a filtered folder still has (n,): its lines are some of theirs, in
    the same order."""
    kept = []
    for name, (queries, documents, _) in drawn.items():
        path = folder / "stage2" / name / "pairs.jsonl"
        left = (row for _, row in read_json_lines(path)) if path.is_file() else iter(())
        row = next(left, None)
        for query, document in zip(queries, documents, strict=True):
            kept.append(row == {"query": query, "document": document})
            row = next(left, None) if kept[-1] else row
    return np.array(kept)


def main(arguments):
    options, _ = read_options(Options, arguments)
    out, drawn = Path(options.out), draw(options)
    planted = np.concatenate([planted for *_, planted in drawn.values()])
    good = {name: tuple(x[~parts[2]] for x in parts) for name, parts in drawn.items()}
    write(options, out / "all", drawn)
    write(options, out / "good", good)
    train = partial(train_and_score, contrastive, options)
    scores, kept = {"all": train("all", out / "all")}, {"all": np.ones_like(planted)}
    judges = [f"{out}/all-{options.seeds.split(',')[0]}", *filter(None, options.judges.split(","))]
    for number, judge in enumerate(judges):
        name = f"kept-{number}"
        consistency.main([f"{out}/all", f"--judge={judge}", f"--out={out}/{name}", "--show=0"])
        kept[name] = kept_rows(out / name, drawn)
        scores[name] = train(name, out / name)
    kept["good"], scores["good"] = ~planted, train("good", out / "good")
    print()
    print_machine(best_device(), f"{len(planted):,} pairs, {planted.sum():,} planted")
    titles = [title for task in scores["all"] for title in (task, "difference")]
    print_head("trained on", "pairs", "planted found", "good lost", *titles)
    titles = ["all pairs", *(f"kept by {judge}" for judge in judges), "the good pairs alone"]
    for title, name in zip(titles, kept, strict=True):
        found, lost = (~kept[name][planted]).mean(), (~kept[name][~planted]).mean()
        cells = [
            shown(summary(x))
            for task, own in scores[name].items()
            for x in (own, own - scores["all"][task])
        ]
        print_row(title, f"{kept[name].sum():,}", f"{found:.1%}", f"{lost:.1%}", *cells)


if __name__ == "__main__":
    cli(main)
