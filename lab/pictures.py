"""A picture for each exercise in class: what the function should do, beside what the student's does
so far. A picture shows a wrong answer, too: that is when it helps.

Each function here draws what one function of the project does, given as `f`, into an axis."""

import importlib
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import write_whole
from common.plots import BLUE, GREY, ORANGE, RED, STYLE, plt
from lab.exercises import EXERCISES
from rope import Rope, rope_angles

TEXT = (
    "Hide some words of a text and let a model guess them. To do that well it has to know which "
    "words stand beside each other, what a sentence needs, and a little of what it is about. "
) * 3


def mask_tokens(f, axis):
    words = TEXT.split()
    vocabulary = ["[MASK]", *sorted(set(words))]
    tokens = np.array([vocabulary.index(word) for word in words])
    inputs, chosen = f(tokens, 0.3, np.random.default_rng(3), 0, [0], len(vocabulary))
    place, row = 0.0, 0
    for before, after, hit in zip(tokens, inputs, chosen, strict=True):
        word = vocabulary[after]
        color = RED if after == 0 else ORANGE if after != before else BLUE
        if place + len(word) > 62:
            place, row = 0.0, row + 1
        weight = "bold" if hit else "normal"
        color = color if hit or after != before else GREY
        axis.text(place, -row, word, color=color, weight=weight, fontsize=7, family="monospace")
        place += len(word) + 1
    axis.set(xlim=(0, 62), ylim=(-row - 1.5, 1.5), xticks=[], yticks=[])
    axis.set_xlabel(
        f"{np.mean(chosen):.0%} chosen (bold): red hidden, orange another word, blue kept"
    )


def rotate(f, axis, D=16, longest=60):
    angles = rope_angles(torch.tensor([0, 200]), 200, D, Rope(trained_length=200))
    q, k = torch.ones(1, D), torch.ones(1, D)
    k[:, : D // 2] = -0.5  # so that turning the other way is another curve
    for start, color, style in ((60, BLUE, "-"), (100, ORANGE, "--"), (139, RED, ":")):
        query = f(q, angles[[start]].cos(), angles[[start]].sin())
        keys = [f(k, angles[[j]].cos(), angles[[j]].sin()) for j in range(start - longest, start)]
        scores = [float((query * key).sum()) for key in keys][::-1]
        label = f"query at position {start}"
        axis.plot(range(1, longest + 1), scores, style, color=color, label=label, lw=1.8)
    axis.legend(fontsize=7)
    axis.set(xlabel="distance of two tokens: the curves coincide", ylabel="score of query and key")


def mean_pool(f, axis):
    lengths, C = [9, 3, 12], 6
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    torch.manual_seed(0)
    level = torch.repeat_interleave(torch.randn(3, C), torch.tensor(lengths), dim=0)
    hidden = level + 0.4 * torch.randn(sum(lengths), C)
    pooled = f(hidden, cu_seqlens)
    canvas = np.full((2 * C + 1, sum(lengths)), np.nan)
    canvas[:C] = hidden.T
    for i, (a, b) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        canvas[C + 1 :, a:b] = pooled[i][:, None]
        axis.axvline(b - 0.5, color="black", lw=1.5)
    axis.imshow(canvas, cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    axis.set(yticks=[C / 2 - 0.5, 1.5 * C + 0.5], yticklabels=["hidden states", "means"])
    axis.set_xlabel("tokens of three packed texts; a row is a feature")
    axis.grid(False)


def info_nce(f, axis, pairs=12, E=8, steps=60):
    torch.manual_seed(0)
    start = torch.randn(2, pairs, E)
    side = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([side], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        f(*torch.nn.functional.normalize(side, dim=-1), 0.1).backward()
        optimizer.step()
    before, after = (torch.nn.functional.normalize(x.detach(), dim=-1) for x in (start, side))
    gap = torch.full((pairs, 1), torch.nan)
    both = torch.cat((before[0] @ before[1].T, gap, after[0] @ after[1].T), 1)
    axis.imshow(both.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(xticks=[pairs / 2, pairs * 1.5 + 1], yticks=[], ylabel="queries")
    axis.set_xticklabels([f"documents, before {steps} steps", "after"])
    axis.set_xlabel("cosines: red 1, white 0, blue -1; the diagonal has the pairs")
    axis.grid(False)


def ndcg(f, axis):
    ranks = range(1, 14)
    for others, color, label in (
        ({}, BLUE, "the only relevant one"),
        ({99: 1}, ORANGE, "one of two, the other is not found"),
    ):
        scores = [f([0] * (rank - 1) + [7] + [0] * 9, {7: 1, **others}) for rank in ranks]
        axis.plot(ranks, scores, "o-", color=color, ms=3, label=label)
    axis.legend(fontsize=7)
    axis.set(xlabel="rank of a relevant document", ylabel="nDCG@10", ylim=(-0.05, 1.1))


PICTURES = {f.__name__: f for f in (mask_tokens, rotate, mean_pool, info_nce, ndcg)}


def draw(exercise, function, path):
    """Draws the target and, where a student has begun, the student's function (its text). With
    function "": the target alone."""
    module, name = importlib.import_module(exercise.file.removesuffix(".py")), exercise.function
    panels = 1 if function == "" else 2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3), squeeze=False)
        PICTURES[name](getattr(module, name), axes[0, 0])
        if panels == 2:
            axes[0, 0].set_title("what it should do")
            draw_own(exercise, function, dict(vars(module)), axes[0, 1])
        figure.tight_layout()
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
        plt.close(figure)


def draw_own(exercise, function, names, axis):
    """The picture of the student's function, or what kept it from being drawn. names: those that
    the function can use."""
    problem = "not begun"
    if function:
        try:
            exec(compile(function, f"{exercise.name}.py", "exec"), names)
            PICTURES[exercise.function](names[exercise.function], axis)
            problem = ""
        except Exception as error:  # whatever a student's function does
            problem = f"{type(error).__name__}: {error}"
    if problem:
        axis.clear()
        axis.set(xticks=[], yticks=[])
        text = "\n".join(textwrap.wrap(problem, 50)[:8])
        axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=8)
    axis.set_title("what yours does")


if __name__ == "__main__":  # those of lab/README.md
    for exercise in EXERCISES[:5]:
        draw(exercise, "", Path(__file__).parent / "img" / f"{exercise.name}.png")
