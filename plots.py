"""Pictures of what runs and evaluations left behind: `python evaluate.py plot`."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1,
}


def plot_all(out):
    """Draws all that the folder `out` has results for. Returns the paths of the pictures."""
    out, made = Path(out), []
    results = (
        json.loads((out / "results.json").read_text()) if (out / "results.json").is_file() else {}
    )
    logs = {}
    for stage in ("mlm", "contrastive", "finetune"):
        if (out / stage / "log.jsonl").is_file():
            logs[stage] = [json.loads(line) for line in open(out / stage / "log.jsonl")]
    pictures = (
        ("curves", draw_curves, logs),
        ("ladder", draw_ladder, results.get("ladder")),
        ("length", draw_length, results.get("long")),
    )
    with plt.rc_context(STYLE):
        for name, draw, content in pictures:
            if content:
                figure = draw(content)
                figure.tight_layout()
                figure.savefig(out / f"{name}.png", dpi=130)
                plt.close(figure)
                made.append(out / f"{name}.png")
    return made


def draw_curves(logs):
    """Training loss and the held-out score of each stage. The loss of a batch depends much on the
    source that it is from, so that each source has a line of its own."""
    titles = {
        "mlm": "1. masked words",
        "contrastive": "2. weak pairs",
        "finetune": "3. hard negatives",
    }
    figure, axes = plt.subplots(1, len(logs), figsize=(3.6 * len(logs), 3), squeeze=False)
    for axis, (stage, log) in zip(axes[0], logs.items(), strict=True):
        sources = list(dict.fromkeys(record.get("source") for record in log))
        for source in sources:
            own = [r for r in log if r.get("source") == source]
            shade = BLUE if len(sources) == 1 else None
            axis.plot([r["step"] for r in own], [r["loss"] for r in own], color=shade, label=source)
        if len(sources) > 1:
            axis.legend(fontsize=6, loc="upper right")
        axis.set(title=titles[stage], xlabel="step")
        axis.set_ylabel("training loss", color=BLUE)
        metric = "dev_accuracy" if stage == "mlm" else "dev_ndcg"
        if not (scored := [r for r in log if metric in r]):
            continue
        right = axis.twinx()
        right.plot(
            [r["step"] for r in scored], [r[metric] for r in scored], "o-", color=ORANGE, ms=4
        )
        right.set_ylabel("masked accuracy, dev" if stage == "mlm" else "nDCG@10, dev", color=ORANGE)
        right.set_ylim(0, 1.6 * max(r[metric] for r in scored))
        right.grid(False)
    return figure


def draw_ladder(rows):
    """nDCG@10 of each row on each task, with standard errors."""
    tasks = list(next(iter(rows.values())))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.5 * len(tasks), 2.6), sharey=True, squeeze=False
    )
    names = list(rows)
    for axis, task in zip(axes[0], tasks, strict=True):
        scores = [rows[name][task]["nDCG@10"] for name in names]
        colors = [GREY if name.startswith("BM25") else BLUE for name in names]
        means = [score["mean"] for score in scores]
        axis.barh(names, means, xerr=[score["error"] for score in scores], color=colors)
        for place, score in enumerate(scores):
            axis.text(score["mean"] + 0.02, place, f"{score['mean']:.2f}", va="center")
        axis.set(
            title=task.replace("-", " → "),
            xlabel="nDCG@10, held-out modules",
            xlim=(0, max(means) * 1.2),
        )
        axis.grid(axis="y", visible=False)
    axes[0][0].invert_yaxis()
    return figure


def draw_length(results):
    """Masked accuracy and retrieval by length, a line for each scaling of RoPE."""
    trained, table = results["trained length"], results["table"]
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2))
    for axis, metric, title in (
        (axes[0], "accuracy", "masked accuracy, held-out text"),
        (axes[1], "nDCG@10", "nDCG@10, long documents cut to the length"),
    ):
        for (name, row), color in zip(table.items(), (GREY, GREEN, ORANGE, BLUE), strict=True):
            lengths = [int(length) for length in row]
            means, errors = (
                [row[length][metric][key] for length in row] for key in ("mean", "error")
            )
            axis.errorbar(
                lengths, means, errors, color=color, label=name, marker="o", ms=3, capsize=2
            )
        axis.axvline(trained, color="black", lw=0.8, ls=":")
        axis.annotate(
            " trained length", (trained, 0.02), xycoords=("data", "axes fraction"), fontsize=8
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set(title=title, xlabel="tokens", ylim=(0, None))
    axes[0].legend()
    return figure
