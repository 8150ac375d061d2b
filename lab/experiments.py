"""Predict, then measure: one thing is changed, and the difference is taken query by query.

Each experiment trains two models, or reads with one in two ways, and scores both on the same
held-out queries. Its docstring is the question.
"""

import dataclasses
from pathlib import Path

import numpy as np
from bench.curve import draw_pairs

import contrastive
import finetune
from common.device import best_device
from common.options import InputError
from data.store import Source
from evaluate import scalings
from metrics import Retrieval, shown, summary
from mlm import held_out_scores
from model import NomicBert, NomicBertForMaskedLM


def rope(options, folder, times=8, windows=60):
    """masked accuracy at 8 times the trained length, Dynamic NTK minus plain RoPE"""
    model = NomicBertForMaskedLM.from_pretrained(f"{options.out}/mlm", device=best_device())
    length = times * model.config.trained_length
    column = Source(f"{options.data}/stage1/long", model.bert.tokenizer).columns["document"]
    texts = [column[row][:length].astype(np.int64) for row in range(len(column))]
    texts = [text for text in texts if len(text) == length]
    if not texts:
        raise InputError(f"{options.data} has no held-out text of {length} tokens")
    drawn = np.random.default_rng(options.seed).permutation(len(texts))[:windows]
    hits = []
    for name in ("Dynamic NTK", "plain RoPE"):
        model.bert.rope = dataclasses.replace(model.bert.rope, **scalings(times)[name])
        hits.append(held_out_scores(model, [texts[i] for i in drawn])[1].numpy())
    return hits


def trained(stage, options, out, *settings):
    """Trains a stage and returns nDCG@10 of each dev query of all tasks (n,)."""
    common = [f"--data={options.data}", f"--seed={options.seed}", "--eval-every=0"]
    stage.main([*common, f"--out={out}", *settings])
    model = NomicBert.from_pretrained(out, device=best_device())
    tasks = Retrieval.open_all(options.data, "dev")
    length = model.config.trained_length
    return np.concatenate([task.scores(task.rank(model, length))["nDCG@10"] for task in tasks])


def few_pairs(options, folder):
    """nDCG@10 with 1,500 pairs, after stage 1 minus from random weights"""
    draw_pairs(Path(options.data), folder / "data", 1500, options.seed)
    given = (f"--data={folder}/data", "--steps=40", "--warmup=4", "--batch-size=128")
    after = (f"--init={options.out}/mlm", "--lr=1e-3")
    return (
        trained(contrastive, options, folder / "after", *given, *after),
        trained(contrastive, options, folder / "random", *given, "--lr=3e-3"),
    )


STAGE_3 = ("--steps=20", "--batch-size=256")


def stage_2(options, folder):
    """nDCG@10 after 20 steps of stage 3, with stage 2 before minus without"""
    return [
        trained(finetune, options, folder / name, f"--init={options.out}/{name}", *STAGE_3)
        for name in ("contrastive", "mlm")
    ]


def hard_negatives(options, folder):
    """nDCG@10 after 20 steps of stage 3, a hard negative for each query minus none"""
    init = f"--init={options.out}/contrastive"
    return [
        trained(finetune, options, folder / str(n), init, *STAGE_3, f"--negatives={n}")
        for n in (1, 0)
    ]


EXPERIMENTS = {
    "rope": rope,
    "few-pairs": few_pairs,
    "stage-2": stage_2,
    "hard-negatives": hard_negatives,
}


def measure(options, name):
    """The difference of each query."""
    folder = Path(options.work, f"experiment-{name}-{options.seed}")
    first, second = EXPERIMENTS[name](options, folder)
    return first - second


def predict_and_measure(options, name):
    """Compares a prediction with what is measured. Returns both, for the record."""
    if name not in EXPERIMENTS:
        raise InputError(f"{name}: the experiments are {', '.join(EXPERIMENTS)}")
    question = EXPERIMENTS[name].__doc__
    if options.predict is None:
        raise InputError(f"predict first, with --predict=0.05 or -0.1: {question}")
    found = summary(measure(options, name))
    verdict = verdict_on(options.predict, found)
    print(f"\n{question}:\n{shown(found)}; you predicted {options.predict:+.3f}: {verdict}")
    return {"predicted": options.predict, **found}


def verdict_on(predicted, found):
    """Where a prediction lies, at two standard errors over queries."""
    low, high = (found["mean"] + sign * 2 * found["error"] for sign in (-1, 1))
    inside = "inside" if low <= predicted <= high else "outside"
    tell = ", and whether there is a difference cannot be told" if low <= 0 <= high else ""
    return f"{inside} {low:+.3f} to {high:+.3f}{tell}"
