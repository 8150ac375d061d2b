"""A record to beat: the best search for the core-seconds of the demo (the rule is in README.md).

    python bench/record.py           # the demo's two stages: the budget of this machine
    python bench/record.py "contrastive.py --lr=2e-3" "finetune.py --init=OUT/contrastive"

Runs the commands in order, once for each seed; OUT stands for a folder of that seed, in which each
script trains in a folder of its own name. Prints the core-seconds that the commands took, with all
that they did, and nDCG@10 of the last model on dev.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.speed import print_table, whole_numbers
from common.device import best_device
from common.options import InputError, cli, read_options, split_words
from metrics import Retrieval
from model import NomicBert

DEMO = ["contrastive.py", "finetune.py --init=OUT/contrastive --negatives=0"]


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    out: str = "out/record"  # a new folder, for the runs
    seeds: str = "0,1,2"  # with commas


def train(commands, options, seed):
    """Runs the commands. Returns the core-seconds that they took, and the last one's directory."""
    folder, before = Path(options.out, str(seed)), os.times()
    if folder.exists():
        raise InputError(f"{folder} is there: remove it, or give another --out")
    for command in commands:
        script, *arguments = shlex.split(command.replace("OUT", str(folder)))
        out = folder / Path(script).stem
        own = [f"--data={options.data}", f"--out={out}", f"--seed={seed}"]
        if subprocess.run([sys.executable, script, *arguments, *own]).returncode:
            raise InputError(f"{command}: the reason is above")
    after = os.times()
    return after[2] + after[3] - before[2] - before[3], out  # of children: user and system


def records(commands, options):
    seeds, rows = whole_numbers("--seeds", options.seeds, least=0), []
    tasks = Retrieval.open_all(options.data, "dev")
    yield "seed", "core-seconds", *(task.name for task in tasks), "mean"
    for seed in seeds:
        seconds, out = train(commands, options, seed)
        model = NomicBert.from_pretrained(out, device=best_device())
        length = model.config.trained_length
        scores = [np.mean(t.scores(t.rank(model, length))["nDCG@10"]) for t in tasks]
        rows.append((seconds, *scores, np.mean(scores)))
        yield str(seed), f"{seconds:,.0f}", *(f"{score:.3f}" for score in rows[-1][1:])
    seconds, *scores = np.mean(rows, axis=0)
    yield "mean", f"{seconds:,.0f}", *(f"{score:.3f}" for score in scores)


def main(arguments):
    commands, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    print_table(*commands, rows=records(commands or DEMO, options))


if __name__ == "__main__":
    cli(main)
