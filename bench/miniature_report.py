"""bench/MINIATURE.md, from what bench/miniature.py measured so far."""

import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import plots
from processes import best_device
from retrieval import summary

RETRIEVAL = ("SciFact", "Amazon")  # tasks of the main table
WRITTEN = "## What it shows\n"  # what people write below this heading is left as it is

FINAL, STAGE_2 = "after stage 3, hard negatives", "after stage 2, weak pairs"
ADDS = {  # what is claimed to add something -> the row with it, the row without
    "stage 1, seen after stage 2": (STAGE_2, "without stage 1, after stage 2"),
    "stage 1, seen after stage 3": (FINAL, "without stage 1, after stage 3"),
    "stage 2, on top of stage 1": (STAGE_2, "after stage 1, masked words"),
    "stage 2, seen after stage 3": (FINAL, "without stage 2"),
    "stage 3, on top of stage 2": (FINAL, STAGE_2),
    "hard negatives": (FINAL, "without hard negatives, equal steps"),
    "consistency filtering": (FINAL, "without consistency filtering"),
    "all of it, over BM25": (FINAL, "BM25"),
}


def cell(score):
    return f"{score['mean']:.3f}" + (f" ±{score['error']:.3f}" if "error" in score else "")


def over_seeds(runs, column):
    """One seed: its mean over queries and the standard error. Several: their mean, and each."""
    means = [scores[column]["mean"] for scores in runs]
    if len(means) == 1:
        return cell(runs[0][column])
    return f"{statistics.mean(means):.3f} ({', '.join(f'{mean:.3f}' for mean in means)})"


def cosines(scores, task="SciFact"):
    return " / ".join(f"{cosine:.2f}" for cosine in scores[task].get("cosines", ()))


def difference(with_it, without, column):
    """What a row has more than another: mean and standard error over queries, of each the mean over
    the seeds that both rows have. What has no seed, BM25, is compared with all."""
    seeds = len(with_it) if without[0].get("seedless") else min(len(with_it), len(without))
    values = [
        np.mean([scores[column]["values"] for scores in runs[:seeds]], axis=0)
        for runs in (with_it, without)
    ]
    return gain(*values)


def gain(values, others):
    found = summary(np.subtract(values, others))
    return f"{found['mean']:+.3f} ±{found['error']:.3f}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def about(command, size, seeds, out):
    """Where and how it was run, what was left out of the training rows, and what was filtered."""
    device = best_device()
    where = f"{torch.get_num_threads()} threads of a CPU, no GPU"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "tokenizers", "numpy"))
    lines = [f"`{command}`, size `{size}`: {where}; Python {platform.python_version()}, "]
    lines.append(f"{packages}; {time.strftime('%Y-%m-%d')}. Seeds of the main rows: {seeds}. ")
    if size != "gpu":
        lines.append("The same on one GPU: `bash bench/miniature.sh SOURCES --seeds=2`. ")
    metas = [Path(out, name, "meta.json") for name in ("pairs", "with-peps", "data")]
    removed = sum(json.loads(m.read_text())["contamination"]["removed"] for m in metas)
    lines.append(f"\n\nTraining rows that repeat held-out text, left out: {removed:,}. ")
    filtered, minutes = Path(out, "filtered", "meta.json"), Path(out, "filtered.minutes")
    if minutes.is_file():
        kept = json.loads(filtered.read_text())["filtered"]
        shares = [f"{name} {n['kept'] / n['rows']:.0%}" for name, n in kept.items()]
        rows, stay = (sum(source[key] for source in kept.values()) for key in ("rows", "kept"))
        lines.append(f"The consistency filter kept {stay:,} of {rows:,} pairs of stage 2, in ")
        lines.append(f"{float(minutes.read_text()):.1f} minutes ({', '.join(shares)}).")
    return "".join(lines).replace(" \n", "\n").strip() + "\n\n"


def report(results, path):
    """Writes the report anew, down to the heading under which people write."""
    rows, text = results["rows"], ["# The paper in miniature\n\n", results["about"]]
    text.append("nDCG@10 of retrieval, Spearman of STS, on text that no training saw; ± is the ")
    text.append("standard error over queries. Of several seeds the mean, with each in brackets. ")
    text.append("Cosines: of a claim with the right abstract, and with one at random. Minutes are ")
    text.append("those of a run and of what it starts from, not of the filter and its judge.\n\n")
    columns = (*RETRIEVAL, "STS")
    lines = [
        [row, *(over_seeds(runs, c) if c in runs[0] else "" for c in columns), cosines(runs[0])]
        + [f"{statistics.mean(run['minutes'] for run in runs):.1f}"]
        for row, runs in rows.items()
    ]
    text.append(table(["", *columns, "cosines, SciFact", "minutes of training"], lines))
    there = {what: pair for what, pair in ADDS.items() if all(row in rows for row in pair)}
    if there:
        text.append("What each part adds, compared query by query:\n\n")
        lines = [
            [what, *(difference(rows[a], rows[b], c) for c in RETRIEVAL)]
            for what, (a, b) in there.items()
        ]
        text.append(table(["", *RETRIEVAL], lines))
    if "dims" in results:
        text.append("The final model's embeddings, cut to their first dimensions (Matryoshka):\n\n")
        lines = [[dims, *(cell(s[c]) for c in columns)] for dims, s in results["dims"].items()]
        text.append(table(["dimensions", *columns], lines))
    if "long" in results:
        trained = results["trained"]
        text.append(f"QMSum, nDCG@10, meetings cut to a length; trained at {trained:,} tokens:\n\n")
        lengths = list(results["long"]["BM25"])
        lines = [
            [name, *(cell(row[n]) if n in row else "" for n in lengths)]
            for name, row in results["long"].items()
        ]
        text.append(table(["tokens", *(f"{int(n):,}" for n in lengths)], lines))
        dynamic = results["long"].get("Dynamic NTK", {})
        if "8192" in dynamic:
            more = gain(dynamic["8192"]["values"], dynamic["2048"]["values"])
            text.append(f"Dynamic NTK, 8,192 tokens over 2,048, query by query: {more}\n\n")
    if "speed" in results:
        lines = [
            [name, f"{s['steps']:,}", f"{s['tokens_per_second']:,.0f}", f"{s['share']:.0%}"]
            + [f"{s['rate'] / 1e12:.3f}", f"{s['minutes']:.1f}"]
            for name, s in results["speed"].items()
        ]
        head = ["stage", "steps", "tokens/s", "share of the matrix products' rate"]
        head += ["that rate, TFLOP/s", "minutes"]
        text.append(table(head, lines))
        text.append("![Training loss of the three stages](miniature-curves.png)\n\n")
    written = path.read_text().partition(WRITTEN)[2] if path.is_file() else ""
    text = "".join(text) + WRITTEN + (written or "\n")
    common.replace(path, lambda temporary: temporary.write_text(text))


def draw(logs, path):
    """The curves of the main runs, beside the report. logs: stage -> records of its log."""
    import matplotlib.pyplot as plt

    with plt.rc_context(plots.STYLE):
        figure = plots.draw_curves(logs)
        figure.tight_layout()
        figure.savefig(path.with_name("miniature-curves.png"), dpi=130)
        plt.close(figure)
