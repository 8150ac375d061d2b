"""Pictures of what runs and evaluations left behind: `python evaluate.py plot`."""

from functools import partial
from pathlib import Path

import matplotlib

from common.files import read_json, read_json_lines, write_whole
from common.options import InputError

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0"
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
plt.rcParams |= {"grid.alpha": 0.3, "font.size": 9, "legend.frameon": False, "lines.linewidth": 1}
plt.rcParams["text.parse_math"] = False  # a $ in the name of a source is a dollar
TITLES = {"mlm": "1. masked language modelling", "contrastive": "2. contrastive pretraining"}
TITLES["finetune"] = "3. finetuning"


def plot_all(out):
    """Draws everything that the folder `out` has results for. Returns the paths of the pictures.

    Raises InputError where it has none, or damaged ones."""
    out, made = Path(out), []
    results = read_json(out / "results.json") if (out / "results.json").is_file() else {}
    paths = {stage: out / stage / "log.jsonl" for stage in TITLES}
    logs = {s: [r for _, r in read_json_lines(p)] for s, p in paths.items() if p.is_file()}
    ladder, length = results.get("ladder"), results.get("long")
    for draw, content in ((draw_curves, logs), (draw_ladder, ladder), (draw_length, length)):
        path = out / f"{draw.__name__.removeprefix('draw_')}.png"
        if content:
            try:
                save_figure(draw(content), path)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"no {path}, since results are damaged: {error!r}") from None
            made.append(path)
    if not made:
        raise InputError(f"{out} has nothing to draw: train first, or give another --out")
    return made


def save_figure(figure, path):
    figure.tight_layout()
    write_whole(path, partial(figure.savefig, dpi=130, format="png", bbox_inches="tight"))
    plt.close(figure)


def draw_curves(logs):
    """Training loss and held-out score of each stage. The loss of a batch depends much on the
    source that it is from, so each source has a line of its own."""
    figure, axes = plt.subplots(1, len(logs), figsize=(3.8 * len(logs), 3), squeeze=False)
    for axis, (stage, log) in zip(axes[0], logs.items(), strict=True):
        losses = [record for record in log if "loss" in record]
        sources = list(dict.fromkeys(record.get("source") for record in losses))
        one_color = {"color": BLUE} if len(sources) == 1 else {}
        for source in sources:
            own = [r for r in losses if r.get("source") == source]
            steps, values = ([record[key] for record in own] for key in ("step", "loss"))
            axis.plot(steps, values, ".-", ms=3, label=source, **one_color)
        if len(sources) > 1:
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.25), "ncol": 3}
            axis.legend(fontsize=6, title="source of the batch", **place)
        axis.set(title=TITLES[stage], xlabel="training step", ylim=(0, None))
        axis.set_ylabel("training loss", color=BLUE)
        metric = "dev_accuracy" if stage == "mlm" else "dev_ndcg"
        name = "masked tokens predicted" if stage == "mlm" else "nDCG@10, held-out text"
        if scored := [r for r in log if metric in r]:
            right, scores = axis.twinx(), [r[metric] for r in scored]
            right.plot([r["step"] for r in scored], scores, "o-", color=ORANGE, ms=4)
            right.set_ylabel(name, color=ORANGE)
            right.set_ylim(0, 1.6 * max(scores))
            right.grid(False)
    return figure


def draw_ladder(tasks):
    """nDCG@10 with standard errors, a bar for each row of each task."""
    size = {"figsize": (4.5 * len(tasks), 2.6), "squeeze": False}
    figure, axes = plt.subplots(1, len(tasks), sharey=True, **size)
    for axis, (task, rows) in zip(axes[0], tasks.items(), strict=True):
        scores = [row["nDCG@10"] for row in rows.values()]
        means = [score["mean"] for score in scores]
        colors = [GREY if name.startswith("BM25") else BLUE for name in rows]
        axis.barh(list(rows), means, xerr=[score["error"] or 0 for score in scores], color=colors)
        for place, score in enumerate(scores):
            end = score["mean"] + (score["error"] or 0)
            axis.text(end, place, f" {score['mean']:.2f}", va="center")
        axis.set(title=task, xlim=(0, max(means) * 1.25))
        axis.set_xlabel("nDCG@10, held-out text")
        axis.grid(axis="y", visible=False)
    axes[0][0].invert_yaxis()
    return figure


def draw_length(results):
    """Masked accuracy by length, a line for each scaling of RoPE."""
    trained, table = results["trained length"], results["table"]
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for (name, row), color in zip(table.items(), (GREY, GREEN, ORANGE, BLUE), strict=True):
        lengths = [int(length) for length in row]
        mean, error = ([score[key] or 0 for score in row.values()] for key in ("mean", "error"))
        axis.errorbar(lengths, mean, error, color=color, label=name, marker="o", ms=3, capsize=2)
    axis.axvline(trained, color="black", lw=0.8, ls=":")
    place = (trained, 0.02)
    axis.annotate(" trained length", place, xycoords=("data", "axes fraction"), fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set(title="masked tokens predicted, held-out text", ylim=(0, None))
    axis.set_xlabel("length of a text, in tokens")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    return figure
