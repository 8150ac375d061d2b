"""Predict, then measure: one thing is changed, and the difference is taken query by query.

Each experiment trains two models, or reads with one in two ways, and scores both on the same
held-out queries or texts. Its docstring is the question.
"""

import dataclasses
from pathlib import Path

import numpy as np

import contrastive
import finetune
from common.device import best_device
from common.options import InputError
from data.store import Source
from evaluate import scalings
from metrics import Retrieval, shown, summary
from mlm import held_out_scores
from model import SHAPE, NomicBert, NomicBertForMaskedLM


def rope(options, folder, times=8):
    """masked accuracy at 8 times the trained length, Dynamic NTK minus plain RoPE"""
    model = NomicBertForMaskedLM.from_pretrained(f"{options.out}/mlm", device=best_device())
    length = times * model.config.trained_length
    column = Source(f"{options.data}/stage1/long", model.bert.tokenizer).columns["document"]
    texts = [column[row][:length].astype(np.int64) for row in range(len(column))]
    texts = [text for text in texts if len(text) == length]
    if len(texts) < 2:
        raise InputError(f"{options.data} has no two held-out texts of {length} tokens")
    accuracy = []  # of each text: its tokens are not independent of each other
    for name in ("Dynamic NTK", "plain RoPE"):
        model.bert.rope = dataclasses.replace(model.bert.rope, **scalings(times)[name])
        hits = [held_out_scores(model, [text])[1] for text in texts]
        accuracy.append(np.array([of_text.mean().item() for of_text in hits]))
    return accuracy


def train_each(stage, options, folder, *models):
    """Trains a stage once with each list of options. Returns nDCG@10 of each dev query of all
    tasks, (n,) for each model."""
    scores = []
    for number, settings in enumerate(models, start=1):
        out = folder / str(number)
        common = [f"--data={options.data}", f"--seed={options.seed}", "--eval-every=0"]
        stage.main([*common, f"--out={out}", *settings])
        model = NomicBert.from_pretrained(out, device=best_device())
        tasks = Retrieval.open_all(options.data, "dev")
        rankings = [task.rank(model, model.config.trained_length) for task in tasks]
        ndcg = [task.scores(r)["nDCG@10"] for task, r in zip(tasks, rankings, strict=True)]
        scores.append(np.concatenate(ndcg))
    return scores


def shape_of(checkpoint):
    """The options for random weights in the shape of a checkpoint."""
    config = NomicBert.from_pretrained(checkpoint).config
    names = (*SHAPE, "rope_base", "trained_length")
    return [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]


def few_pairs(options, folder):
    """nDCG@10 with 1,500 pairs, after stage 1 minus from random weights"""
    pairs, stage_1 = ("--pairs=1500", "--steps=40", "--warmup=4"), f"{options.out}/mlm"
    after = (*pairs, "--batch-size=128", f"--init={stage_1}", "--lr=1e-3")  # the best rate of each
    random = (*pairs, "--batch-size=128", *shape_of(stage_1), "--lr=3e-3")
    return train_each(contrastive, options, folder, after, random)


def stage_2(options, folder):
    """nDCG@10 after 20 steps of stage 3, with stage 2 before minus without"""
    before = f"{options.out}/contrastive"
    steps = ("--steps=20", "--batch-size=256", "--negatives=0")  # mining would take longer
    after, random = (*steps, f"--init={before}"), (*steps, *shape_of(before))
    return train_each(finetune, options, folder, after, random)


def hard_negatives(options, folder):
    """nDCG@10 after 20 steps of stage 3, a hard negative for each query minus none"""
    steps = ("--steps=20", "--batch-size=256", f"--init={options.out}/contrastive")
    one, none = ((*steps, f"--negatives={n}") for n in (1, 0))
    return train_each(finetune, options, folder, one, none)


TWO_MODELS = "trains two models and searches with each: minutes on two cores"
EXPERIMENTS = {
    "rope": (rope, "reads each long held-out text in two ways: less than a minute"),
    "few-pairs": (few_pairs, TWO_MODELS),
    "stage-2": (stage_2, TWO_MODELS),
    "hard-negatives": (hard_negatives, TWO_MODELS),
}


def predict_and_measure(options, name):
    """Compares a prediction with what is measured. Returns both, for the record."""
    if name not in EXPERIMENTS:
        raise InputError(f"{name}: the experiments are {', '.join(EXPERIMENTS)}")
    experiment, takes = EXPERIMENTS[name]
    if options.predict is None:
        raise InputError(f"predict first, with --predict=0.05 or -0.1: {experiment.__doc__}")
    print(f"{experiment.__doc__}\n{name} {takes}", flush=True)
    first, second = experiment(options, Path(options.work, f"experiment-{name}-{options.seed}"))
    measured = summary(first - second)
    verdict = verdict_on(options.predict, measured)
    print(f"\n{shown(measured)}; you predicted {options.predict:+.3f}: {verdict}")
    return {"predicted": options.predict, **measured}


def verdict_on(predicted, measured):
    """Where a prediction lies, at two standard errors over queries or texts."""
    low, high = (measured["mean"] + sign * 2 * measured["error"] for sign in (-1, 1))
    inside = "inside" if low <= predicted <= high else "outside"
    tell = ", and whether there is a difference cannot be told" if low <= 0 <= high else ""
    return f"{inside} {low:+.3f} to {high:+.3f}{tell}"
