"""Predict, then measure: one thing is changed, and the difference is taken query by query.

Each experiment trains two models, or reads with one in two ways, and scores both on the same
held-out queries. `python lab/lab.py experiment bands` writes the mean and the standard deviation of
each difference over five seeds to lab/bands.json; `experiment bands NAME ...` only measures these.
"""

import contextlib
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import contrastive
import finetune
from bench.curve import draw_pairs
from common.device import best_device
from common.files import read_json, write_json
from common.options import InputError
from data.store import Source
from evaluate import Retrieval, scalings, shown, summary
from lab.cutting import ROOT, copy_project, cut
from lab.exercises import EXERCISES
from mlm import held_out_scores
from model import NomicBert, NomicBertForMaskedLM

BANDS, SEEDS = Path(__file__).parent / "bands.json", 5


def queries(options, checkpoint):
    """nDCG@10 of each dev query of all tasks (n,)."""
    model = NomicBert.from_pretrained(checkpoint, device=best_device())
    tasks = Retrieval.open_all(options.data, "dev")
    length = model.config.trained_length
    return np.concatenate([task.scores(task.rank(model, length))["nDCG@10"] for task in tasks])


def train(stage, options, folder, *settings):
    """Trains a stage for an experiment and returns its scores."""
    common = [f"--data={options.data}", f"--seed={options.seed}", "--eval-every=0"]
    stage.main([*common, f"--out={folder}", *settings])
    return queries(options, folder)


def stage_2(options, folder):
    steps = ("--steps=20", "--batch-size=256")
    return [
        train(finetune, options, folder / name, f"--init={options.out}/{name}", *steps)
        for name in ("contrastive", "mlm")
    ]


def hard_negatives(options, folder):
    given = (f"--init={options.out}/contrastive", "--steps=20", "--batch-size=256")
    return [train(finetune, options, folder / str(n), *given, f"--negatives={n}") for n in (1, 0)]


def few_pairs(options, folder, pairs=1500):
    data = folder / "data"
    draw_pairs(Path(options.data), data, pairs, options.seed)
    given = (f"--data={data}", "--steps=40", "--warmup=4", "--batch-size=128")
    after = (f"--init={options.out}/mlm", "--lr=1e-3")
    shape = NomicBert.from_pretrained(f"{options.out}/mlm").config
    random = (
        f"--num-hidden-layers={shape.num_hidden_layers}",
        f"--hidden-size={shape.hidden_size}",
    )
    return [
        train(contrastive, options, folder / name, *given, *more)
        for name, more in (("after", after), ("random", (*random, "--lr=3e-3")))
    ]


def gather(options, folder):
    """In two processes, as torchrun starts them, in copies of the project."""
    exercise, scores = next(e for e in EXERCISES if e.function == "Gather.backward"), []
    old, without_gradient = exercise.wrong[0]
    real = cut((ROOT / exercise.file).read_text(), exercise.function)
    for name, function in (("with", real), ("without", real.replace(old, without_gradient))):
        project = folder / f"{name}-project"
        shutil.rmtree(project, ignore_errors=True)  # of a run before
        copy_project(project, {exercise: function})
        settings = ["--steps=60", "--batch-size=128", "--num-hidden-layers=1", "--eval-every=0"]
        settings += [f"--data={Path(options.data).resolve()}", f"--seed={options.seed}"]
        settings += [f"--out={(folder / name).resolve()}"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, "--nproc-per-node=2", "contrastive.py", *settings]
        if subprocess.run(command, cwd=project).returncode:
            raise InputError("contrastive.py stopped: the reason is above")
        scores.append(queries(options, folder / name))
    return scores


def rope(options, folder, times=8, windows=60):
    """Masked tokens predicted, in texts of 8 times the trained length."""
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


EXPERIMENTS = {  # name -> what is compared, and how
    "rope": ("masked accuracy at 8 times the trained length, Dynamic NTK minus plain RoPE", rope),
    "few-pairs": ("nDCG@10 with 1,500 pairs, after stage 1 minus from random weights", few_pairs),
    "stage-2": ("nDCG@10 after 20 steps of stage 3, with stage 2 before minus without", stage_2),
    "gather": ("nDCG@10 of two processes, negatives gathered with gradient minus without", gather),
    "hard-negatives": ("nDCG@10 after 20 steps of stage 3, hard negatives minus none",
                       hard_negatives),
}  # fmt: skip


def measure(options, name, seed):
    """The difference of each query."""
    options = dataclasses.replace(options, seed=seed)
    folder = Path(options.work, f"experiment-{name}-{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    first, second = EXPERIMENTS[name][1](options, folder)
    return first - second


def run(options, words):
    """Asks for a prediction, measures, and compares. Returns both, for the record."""
    if words[:1] == ["bands"] and set(words[1:]) <= set(EXPERIMENTS):
        bands = read_json(BANDS) if BANDS.is_file() else {}
        for name in words[1:] or EXPERIMENTS:
            means = [float(measure(options, name, seed).mean()) for seed in range(SEEDS)]
            bands[name] = {"mean": np.mean(means), "deviation": np.std(means, ddof=1)}
            bands[name] |= {"seeds": means}
            write_json(BANDS, bands)
        return None
    if len(words) != 1 or words[0] not in EXPERIMENTS:
        raise InputError(f"experiment: give one of {', '.join(EXPERIMENTS)}")
    name, question = words[0], EXPERIMENTS[words[0]][0]
    for stage in ("mlm", "contrastive"):
        if not Path(options.out, stage, "model.safetensors").is_file():
            raise InputError(f"{options.out}/{stage} is missing: make demo, or --out=DIR of one")
    print(question)
    predicted = options.predict
    if not predicted and sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            predicted = input("Your prediction, sign and size, such as 0.05 or -0.1: ")
    if not re.fullmatch(r"[+-]?(\d*\.)?\d+", predicted.strip()):
        raise InputError("predict first: --predict=0.05, or -0.1: sign and size")
    predicted = float(predicted)
    found = summary(measure(options, name, options.seed))
    verdict = verdict_on(predicted, found)
    print(f"\n{question}:\n{shown(found)}; you predicted {predicted:+.3f}: {verdict}")
    if BANDS.is_file() and name in (bands := read_json(BANDS)):
        band = bands[name]
        low, high = (band["mean"] + sign * 3 * band["deviation"] for sign in (-1, 1))
        print(f"{len(band['seeds'])} seeds, mean ± 3 deviations: {low:+.3f} to {high:+.3f}")
    return {"predicted": predicted, **found}


def verdict_on(predicted, found):
    """Where a prediction lies, at two standard errors over queries."""
    mean, error = found["mean"], found["error"]
    inside = "inside" if abs(predicted - mean) <= 2 * error else "outside"
    tell = ", and whether there is a difference cannot be told" if abs(mean) <= 2 * error else ""
    return f"{inside} {mean - 2 * error:+.3f} to {mean + 2 * error:+.3f}{tell}"
