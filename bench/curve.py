"""What is stage 1 worth, counted in pairs? nDCG@10 against the number of pairs of stage 2, from
random weights and after stage 1 of several lengths.

    python bench/curve.py                                            # many hours on two cores
    python bench/curve.py --sizes=1500 --mlm-steps=200 --seeds=0     # one point of each line

A comparison is fair only if each line has its own learning rate: the best on dev, with the first
seed, of --rates. Reported is test, with standard errors over queries of the mean over seeds;
differences are those of each query. A seed draws other pairs too. Each run leaves its scores in
OUT/scores: the same command continues an interrupted one. OUT/report.md and curve.png show what
there is.
"""

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import mlm
from bench.shared import keep
from common.device import best_device
from common.files import load_tokenizer, write_text, write_whole
from common.options import InputError, cli, read_options
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
    out: str = "out/curve"  # for runs, results and the picture
    sizes: str = "500,1500,5000,15000,131000"  # pairs of stage 2, drawn from all sources
    mlm_steps: str = "1600,4800"  # lengths of stage 1, a line each
    rates: str = "3e-4,1e-3,3e-3"  # learning rates to choose from
    seeds: str = "0,1,2"  # of each point; the rates are tried with the first
    layers: int = 2  # of the model
    hidden_size: int = 256  # of the model [64, 4096]
    options: str = ""  # more options of contrastive.py, for all lines


def draw_pairs(data, out, count, seed):
    """Writes the data folder `out`: `data` with `count` pairs of stage 2, some of each source."""
    if out.exists():
        return
    sources = open_sources(data / "stage2", load_tokenizer(data))
    share = min(1, count / sum(map(len, sources)))
    with data_folder(out) as folder:
        copy_data(data, folder, {str(data): ["stage2"]})
        for source in sources:
            order = np.random.default_rng([seed, len(source)]).permutation(len(source))
            chosen = np.zeros(len(source), bool)
            chosen[order[: round(share * len(source))]] = True
            old, prefixes = data / "stage2" / source.name, source.meta["prefixes"]
            new = folder / "stage2" / source.name
            write_source(new, {}, prefixes, load_tokenizer(data), stored=[old], keep=chosen)


def run_point(options, line, size, rate, seed):
    """Trains one model. Returns split -> task -> nDCG@10 of each query."""
    out, common, init = Path(options.out), [f"--seed={seed}", "--eval-every=0"], []
    shape = [f"--hidden-size={options.hidden_size}", f"--num-hidden-layers={options.layers}"]
    if line != RANDOM:
        init = [f"--init={out}/mlm-{line}-{seed}"]
        given = [f"--data={options.data}", f"--out={out}/mlm-{line}-{seed}", f"--steps={line}"]
        mlm.main([*given, *shape, *common])
    data, batch_size = out / f"pairs-{size}-{seed}", 256 if size < 100_000 else 512
    draw_pairs(Path(options.data), data, size, seed)
    steps = min(200, max(40, 12 * size // batch_size))  # at most 12 epochs
    name = f"{line}-{size}-{rate}-{seed}".replace(" ", "-")
    given = [f"--data={data}", f"--out={out}/{name}", f"--lr={rate}", f"--steps={steps}"]
    given += [f"--warmup={steps // 10}", f"--batch-size={min(batch_size, size)}"]
    contrastive.main([*given, *(init or shape), *common, *options.options.split()])
    model = NomicBert.from_pretrained(out / name, device=best_device())
    scores = {"dev": {}, "test": {}}
    for both in zip(*(Retrieval.open_all(options.data, split) for split in scores), strict=True):
        task, held_out = both[0], len(both[0].queries)
        task.queries += both[1].queries  # so that the documents are encoded once
        task.relevant += both[1].relevant
        found = task.scores(task.rank(model, model.config.trained_length))["nDCG@10"]
        scores["dev"][task.name], scores["test"][task.name] = found[:held_out], found[held_out:]
    shutil.rmtree(out / name)  # its scores are what is needed
    return scores


def dev_score(scores):
    return np.mean([np.mean(values) for values in scores["dev"].values()])


def points_of(runs, line, size):
    """(the best rate on dev in the first seed, task -> nDCG@10 of each query of test, mean over
    seeds)."""
    here = {key: scores for key, scores in runs.items() if key[:2] == (line, size)}
    first = min((key[3] for key in here), default=None)
    tried = {key[2]: dev_score(scores) for key, scores in here.items() if key[3] == first}
    if not tried:
        return None, {}
    best = max(tried, key=tried.get)
    seeds = [scores["test"] for key, scores in here.items() if key[2] == best]
    return best, {task: np.mean([seed[task] for seed in seeds], axis=0) for task in seeds[0]}


def report(runs, lines, sizes):
    """(a Markdown table for each task: nDCG@10, the rate, the difference from random weights; the
    points)."""
    text = ""
    points = {(line, size): points_of(runs, line, size) for line in lines for size in sizes}
    for task in next(found for _, found in points.values() if found):
        titles = [name if name == RANDOM else f"stage 1, {name} steps" for name in lines]
        text += f"\n{task}\n\n| pairs | {' | '.join(titles)} |\n|---:|{'---:|' * len(lines)}\n"
        for size in sizes:
            cells, base = [], points[RANDOM, size][1]
            for line in lines:
                rate, found = points[line, size]
                cell = f"{shown(summary(found[task]))} at {rate}" if found else ""
                if line != RANDOM and found and base:
                    cell += f", {shown(summary(found[task] - base[task]))}"
                cells.append(cell)
            text += f"| {size:,} | {' | '.join(cells)} |\n"
    return text, points


def draw(points, lines, sizes, path):
    """A line with a band of one standard error for each start; where a line of stage 1 falls below
    that of random weights, a dotted mark: the crossover."""
    from common.plots import BLUE, GREEN, GREY, ORANGE, plt

    tasks = list(next(found for _, found in points.values() if found))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        curves = {}
        for line, color in zip(lines, (GREY, ORANGE, BLUE, GREEN), strict=False):
            found = [(n, summary(points[line, n][1][task])) for n in sizes if points[line, n][1]]
            x = np.array([n for n, _ in found])
            mean, error = (np.array([s[key] for _, s in found]) for key in ("mean", "error"))
            label = line if line == RANDOM else f"after {int(line):,} steps of stage 1"
            axis.plot(x, mean, "o-", ms=3, color=color, label=label)
            axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, lw=0)
            curves[line] = dict(zip(x.tolist(), mean, strict=True)), color
        for curve, color in curves.values():
            both = [n for n in curve if n in curves[RANDOM][0]]
            ahead = [curve[n] - curves[RANDOM][0][n] for n in both]
            for i in range(len(both) - 1):
                if ahead[i] > 0 >= ahead[i + 1]:  # straight lines over the logarithm of the pairs
                    part = ahead[i] / (ahead[i] - ahead[i + 1])
                    axis.axvline(both[i] * (both[i + 1] / both[i]) ** part, color=color, ls=":")
        query, document = task.split("-")[0], task.split("-")[-1]
        axis.set(xscale="log", xlabel="pairs of stage 2; dotted: where stage 1 no longer pays")
        axis.set(title=f"find the {document} of a {query}", ylabel="nDCG@10, held-out modules")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7)
        axis.minorticks_off()
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncol": len(lines)}
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, **place)
    figure.tight_layout()
    settings = {"dpi": 130, "format": "png", "bbox_inches": "tight"}
    write_whole(path, lambda temporary: figure.savefig(temporary, **settings))
    plt.close(figure)


def main(arguments):
    options, _ = read_options(Options, arguments)
    sizes, rates = ([x for x in text.split(",") if x] for text in (options.sizes, options.rates))
    lines = [RANDOM, *(x for x in options.mlm_steps.split(",") if x)]
    seeds = [x for x in options.seeds.split(",") if x]
    if not (rates and sizes and seeds and all(map(str.isdecimal, [*sizes, *lines[1:], *seeds]))):
        raise InputError("--sizes, --mlm-steps, --rates, --seeds: give numbers with commas between")
    sizes, seeds, out = list(map(int, sizes)), list(map(int, seeds)), Path(options.out)
    pydocs.make_if_missing(options.data)
    settings = {key: asdict(options)[key] for key in ("data", "layers", "hidden_size", "options")}
    if (before := keep(out / "settings.json", lambda: settings)) != settings:
        raise InputError(f"{out} has results of {before}: choose another --out")
    runs = {}

    def run(*key):
        print("\n{}, {:,} pairs, rate {}, seed {}".format(*key), flush=True)
        path = out / "scores" / ("-".join(map(str, key)).replace(" ", "-") + ".json")
        runs[key] = keep(path, lambda: run_point(options, *key))
        text, points = report(runs, lines, sizes)
        write_text(out / "report.md", text)
        draw(points, lines, sizes, out / "curve.png")

    for seed in seeds:
        for size in sizes:
            for line in lines:
                for rate in rates if seed == seeds[0] else [points_of(runs, line, size)[0]]:
                    run(line, size, rate, seed)
    print(report(runs, lines, sizes)[0])


if __name__ == "__main__":
    cli(main)
