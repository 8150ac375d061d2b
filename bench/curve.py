"""What is stage 1 worth, counted in pairs? nDCG@10 against the number of pairs of stage 2, from
random weights and after stage 1 of several lengths.

    python bench/curve.py                                            # many hours on two cores
    python bench/curve.py --sizes=1500 --mlm-steps=200 --seeds=0     # one point of each line

A comparison is fair only if each line has its own learning rate: the best on dev, with the first
seed, of --rates. Reported is test, with standard errors over queries of the mean over seeds;
differences are those of each query. A seed draws other pairs too. Each run leaves its scores in
OUT/scores: the same command continues an interrupted one. OUT/curve.png is the picture.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import mlm
from bench.shared import keep, print_head, print_row
from common.device import best_device
from common.files import load_tokenizer
from common.options import InputError, cli, read_options
from common.plots import BLUE, GREEN, GREY, ORANGE, plt, save_figure
from data import pydocs
from data.filter import copy_data
from data.prepare import data_folder, write_source
from data.store import open_sources
from evaluate import Retrieval, shown, summary
from model import NomicBert

RANDOM = "random weights"


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
        copy_data(data, folder, {str(data): ["stage2"]})
        for source in sources:
            order = np.random.default_rng([seed, len(source)]).permutation(len(source))
            chosen = np.zeros(len(source), bool)
            chosen[order[: round(share * len(source))]] = True
            old, new = (place / "stage2" / source.name for place in (data, folder))
            write_source(new, (), source.meta["prefixes"], tokenizer, stored=[old], keep=chosen)


def run_point(options, line, size, rate, seed):
    """Trains one model. Returns split -> task -> nDCG@10 of each query."""
    out, common, init = Path(options.out), [f"--seed={seed}", "--eval-every=0"], []
    common += options.options.split()
    if line != RANDOM:
        init = [f"--init={out}/mlm-{line}-{seed}"]
        given = [f"--data={options.data}", f"--out={out}/mlm-{line}-{seed}", f"--steps={line}"]
        mlm.main([*given, *common])
    data, batch_size = out / f"pairs-{size}-{seed}", 256 if size < 100_000 else 512
    draw_pairs(Path(options.data), data, size, seed)
    steps = min(200, max(40, 12 * size // batch_size))  # at most 12 epochs
    run = out / f"{line}-{size}-{rate}-{seed}".replace(" ", "-")
    given = [f"--data={data}", f"--out={run}", f"--lr={rate}", f"--steps={steps}"]
    given += [f"--warmup={steps // 10}", f"--batch-size={min(batch_size, size)}"]
    contrastive.main([*given, *init, *common])
    model, scores = NomicBert.from_pretrained(run, device=best_device()), {}
    for split in ("dev", "test"):
        tasks = Retrieval.open_all(options.data, split)
        ranked = [task.rank(model, model.config.trained_length) for task in tasks]
        both = zip(tasks, ranked, strict=True)
        scores[split] = {task.name: task.scores(found)["nDCG@10"] for task, found in both}
    return scores


def dev_score(scores):
    return np.mean([np.mean(values) for values in scores["dev"].values()])


def point_of(runs, line, size):
    """(the best rate on dev in the first seed, task -> nDCG@10 of each query of test, mean over
    seeds). runs: (line, size, rate, seed) -> what run_point returned."""
    here = {key[2:]: scores for key, scores in runs.items() if key[:2] == (line, size)}
    first = min((seed for _, seed in here), default=None)
    tried = {rate: dev_score(scores) for (rate, seed), scores in here.items() if seed == first}
    best = max(tried, key=tried.get)
    seeds = [scores["test"] for (rate, _), scores in here.items() if rate == best]
    return best, {task: np.mean([seed[task] for seed in seeds], axis=0) for task in seeds[0]}


def print_table(points, lines, sizes, task):
    """nDCG@10, the learning rate, and the difference from random weights."""
    print(f"\n{task}\n")
    print_head("pairs", *(n if n == RANDOM else f"stage 1, {n} steps" for n in lines))
    for size in sizes:
        cells, base = [], points[RANDOM, size][1][task]
        for line in lines:
            rate, found = points[line, size]
            difference = f", {shown(summary(found[task] - base))}" if line != RANDOM else ""
            cells.append(f"{shown(summary(found[task]))} at {rate}{difference}")
        print_row(f"{size:,}", *cells)


def draw(points, lines, sizes, tasks):
    """A line for each start, with a band of one standard error."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for line, color in zip(lines, (GREY, ORANGE, BLUE, GREEN), strict=False):
            found = [summary(points[line, size][1][task]) for size in sizes]
            mean, error = (np.array([score[key] for score in found]) for key in ("mean", "error"))
            label = line if line == RANDOM else f"after {int(line):,} steps of stage 1"
            axis.plot(sizes, mean, "o-", ms=3, color=color, label=label)
            axis.fill_between(sizes, mean - error, mean + error, color=color, alpha=0.2, lw=0)
        query, document = task.split("-")[0], task.split("-")[-1]
        axis.set(xscale="log", xlabel="pairs of stage 2", ylabel="nDCG@10, held-out modules")
        axis.set(title=f"find the {document} of a {query}")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7)
        axis.minorticks_off()
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncol": len(lines)}
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, **place)
    return figure


def main(arguments):
    options, _ = read_options(Options, arguments)
    lines, rates = [RANDOM, *options.mlm_steps.split(",")], options.rates.split(",")
    try:
        sizes, seeds = ([int(n) for n in x.split(",")] for x in (options.sizes, options.seeds))
    except ValueError:
        raise InputError("--sizes, --seeds: give whole numbers with commas between them") from None
    pydocs.make_if_missing(options.data)
    out, settings, runs = Path(options.out), [options.data, options.options], {}
    if (before := keep(out / "settings.json", lambda: settings)) != settings:
        raise InputError(f"{out} has results of {before}: choose another --out")
    for seed in seeds:
        for line, size in ((line, size) for size in sizes for line in lines):
            for rate in rates if seed == seeds[0] else [point_of(runs, line, size)[0]]:
                key = line, size, rate, seed
                print("\n{}, {:,} pairs, rate {}, seed {}".format(*key), flush=True)
                path = out / "scores" / ("-".join(map(str, key)).replace(" ", "-") + ".json")
                runs[key] = keep(path, lambda key=key: run_point(options, *key))
    points = {(line, size): point_of(runs, line, size) for line in lines for size in sizes}
    tasks = list(points[RANDOM, sizes[0]][1])
    for task in tasks:
        print_table(points, lines, sizes, task)
    save_figure(draw(points, lines, sizes, tasks), out / "curve.png")


if __name__ == "__main__":
    cli(main)
