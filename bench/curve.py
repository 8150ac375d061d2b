"""What is stage 1 worth, counted in pairs? nDCG@10 against the number of pairs of stage 2, from
random weights and after stage 1 of several lengths.

    python bench/curve.py                                            # many hours on two cores
    python bench/curve.py --sizes=1500 --mlm-steps=200 --seeds=0     # one point of each line

A comparison is fair only if each line has its own learning rate: the best on dev, with the first
seed, of --rates. Reported is test, with standard errors over queries of the mean over seeds;
differences are those of each query. A seed draws other pairs too. Each run leaves its scores in
OUT/scores: the same command continues an interrupted one. OUT/curve.png is the picture.
"""

import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import mlm
from bench.shared import keep, keep_settings, print_head, print_row, whole_numbers
from common.device import best_device
from common.files import load_tokenizer
from common.options import cli, read_options
from common.plots import BLUE, GREEN, GREY, ORANGE, plt, save_figure
from data import pydocs
from data.filter import copy_data
from data.prepare import data_folder, write_source
from data.store import open_sources
from evaluate import Retrieval, shown, summary
from model import NomicBert


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    out: str = "out/curve"  # for runs, scores and the picture; another one for other options
    sizes: str = "500,1500,5000,15000,131000"  # pairs of stage 2, drawn from all sources
    mlm_steps: str = "1600,4800"  # lengths of stage 1, a line each
    rates: str = "3e-4,1e-3,3e-3"  # learning rates of stage 2 to choose from
    seeds: str = "0,1,2"  # of each point; the rates are tried with the first
    options: str = ""  # more options of both stages, such as "--num-hidden-layers=4"


def draw_pairs(data, out, count, seed):
    """Writes the data folder `out`: `data` with `count` pairs of stage 2, some of each source."""
    if out.exists():
        return
    tokenizer = load_tokenizer(data)
    sources = open_sources(data / "stage2", tokenizer)
    share = min(1, count / sum(map(len, sources)))
    with data_folder(out) as folder:
        copy_data(data, folder, {data: ["stage2"]})
        for source in sources:
            order = np.random.default_rng([seed, len(source)]).permutation(len(source))
            chosen = np.zeros(len(source), bool)
            chosen[order[: round(share * len(source))]] = True
            old, new = (place / "stage2" / source.name for place in (data, folder))
            write_source(new, (), source.meta["prefixes"], tokenizer, stored=[old], keep=chosen)


def run_point(options, line, size, rate, seed):
    """Trains one model, after `line` steps of stage 1. Returns split -> task -> nDCG@10 of each
    query."""
    common = [f"--seed={seed}", "--eval-every=0", *options.options.split()]
    start, data, out = (
        Path(options.out, f"{name}-{seed}")
        for name in (f"mlm-{line}", f"pairs-{size}", f"{line}-{size}-{rate}")
    )
    given = [f"--data={data}", f"--out={out}", f"--lr={rate}"]
    if line:
        mlm.main([f"--data={options.data}", f"--out={start}", f"--steps={line}", *common])
        given.append(f"--init={start}")
    draw_pairs(Path(options.data), data, size, seed)
    batch_size = min(size, 256 if size < 100_000 else 512)
    steps = min(200, max(40, 12 * size // batch_size))  # at most 12 epochs
    given += [f"--batch-size={batch_size}", f"--steps={steps}", f"--warmup={steps // 10}"]
    contrastive.main([*given, *common])
    model, scores = NomicBert.from_pretrained(out, device=best_device()), {}
    for split in ("dev", "test"):
        scores[split] = {}
        for task in Retrieval.open_all(options.data, split):
            ranking = task.rank(model, model.config.trained_length)
            scores[split][task.name] = task.scores(ranking)["nDCG@10"]
    return scores


def point_of(runs):
    """(the best rate on dev in the first seed, task -> nDCG@10 of each query of test, mean over
    seeds). runs: (rate, seed) -> what run_point returned, the first seed first."""
    _, first = next(iter(runs))
    tried = {
        rate: np.mean([np.mean(values) for values in scores["dev"].values()])
        for (rate, seed), scores in runs.items()
        if seed == first
    }
    best = max(tried, key=tried.get)
    seeds = [scores["test"] for (rate, _), scores in runs.items() if rate == best]
    return best, {task: np.mean([seed[task] for seed in seeds], axis=0) for task in seeds[0]}


def title_of(line):
    return f"after {line:,} steps of stage 1" if line else "random weights"


def print_table(points, lines, sizes, task):
    """nDCG@10, the learning rate, and the difference from random weights."""
    print(f"\n{task}\n")
    print_head("pairs", *map(title_of, lines))
    for size in sizes:
        cells, base = [], points[0, size][1][task]
        for line in lines:
            rate, found = points[line, size]
            difference = f", {shown(summary(found[task] - base))}" if line else ""
            cells.append(f"{shown(summary(found[task]))} at {rate}{difference}")
        print_row(f"{size:,}", *cells)


def draw(points, lines, sizes, tasks):
    """A line for each start, with standard errors."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for line, color in zip(lines, (GREY, ORANGE, BLUE, GREEN), strict=False):
            found = [summary(points[line, size][1][task]) for size in sizes]
            mean, error = ([score[key] for score in found] for key in ("mean", "error"))
            style = {"color": color, "marker": "o", "ms": 3, "capsize": 2}
            axis.errorbar(sizes, mean, error, label=title_of(line), **style)
        query, document = task.split("-")
        axis.set(xscale="log", xlabel="pairs of stage 2", title=f"find the {document} of a {query}")
        axis.set(ylabel="nDCG@10, held-out modules", ylim=(0, None))
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7)
        axis.minorticks_off()
    axes[0][0].legend(fontsize=8)
    return figure


def main(arguments):
    options, _ = read_options(Options, arguments)
    lines, sizes = [0, *whole_numbers(options.mlm_steps)], whole_numbers(options.sizes)
    pydocs.make_if_missing(options.data)
    keep_settings(options.out, options.data, options.options)
    points = {}  # (line, size) -> what point_of returned
    for size, line in itertools.product(sizes, lines):
        runs = {}
        for seed in whole_numbers(options.seeds):
            for rate in [point_of(runs)[0]] if runs else options.rates.split(","):
                print(f"\n{title_of(line)}, {size:,} pairs, rate {rate}, seed {seed}", flush=True)
                path = Path(options.out, "scores", f"{line}-{size}-{rate}-{seed}.json")
                work = partial(run_point, options, line, size, rate, seed)
                runs[rate, seed] = keep(path, work)
        points[line, size] = point_of(runs)
    tasks = list(points[0, sizes[0]][1])
    for task in tasks:
        print_table(points, lines, sizes, task)
    save_figure(draw(points, lines, sizes, tasks), Path(options.out, "curve.png"))


if __name__ == "__main__":
    cli(main)
