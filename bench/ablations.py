"""What does each stage add? The laptop preset, with one part left out at a time.

    python bench/ablations.py               # three seeds; about 20 minutes each on two cores
    python bench/ablations.py --seeds=1

Runs lie in out/ablations/SEED/; one that is complete is not run again, so that an interrupted bench
goes on where it stopped. The table is nDCG@10 on the test queries: mean and standard deviation over
the seeds.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import evaluate
import finetune
import mlm
from model import NomicBert
from options import read_options, run
from processes import best_device
from retrieval import Retrieval

# row of the table -> its last run. Runs: name -> (stage, the run that it starts from, its options)
ROWS = {
    "all three stages": "finetune",
    "without stage 1": "finetune-without-1",
    "without stage 2": "finetune-without-2",
    "without stage 3": "contrastive",
    "without hard negatives, equal steps": "finetune-easy",
    "without hard negatives, equal time": "finetune-easy-longer",
}
RUNS = {
    "mlm": (mlm, "", ()),
    "contrastive": (contrastive, "mlm", ()),
    "finetune": (finetune, "contrastive", ()),
    "contrastive-without-1": (contrastive, "", ()),
    "finetune-without-1": (finetune, "contrastive-without-1", ()),
    "finetune-without-2": (finetune, "mlm", ()),
    "finetune-easy": (finetune, "contrastive", ("--negatives=0",)),
    "finetune-easy-longer": (finetune, "contrastive", ("--negatives=0",)),
}


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    out: str = "out/ablations"  # for the runs, and their results.json
    seeds: int = 3  # how often to run it all
    rows: str = ""  # only the rows whose name begins so, such as "all"
    scale: float = 1.0  # of the steps of every stage: 0.1 for a quick look


def train(runs, name, folder, arguments_of):
    """Runs one of `runs`, after what it starts from, unless it is there. Returns minutes, of both.

    arguments_of(stage, name): the options of a run beside its own."""
    stage, before, own = runs[name]
    minutes_before = train(runs, before, folder, arguments_of) if before else 0.0
    minutes = folder / f"{name}.minutes"
    if not minutes.is_file():
        init = [f"--init={folder / before}"] if before else []
        arguments = [f"--out={folder / name}", *arguments_of(stage, name), *init, *own]
        began = time.perf_counter()
        stage.main(arguments)
        minutes.write_text(str((time.perf_counter() - began) / 60))
    return minutes_before + float(minutes.read_text())


def arguments_of(stage, name, folder, seed, options):
    """The laptop preset; "equal time" trains as long as mining and training with negatives take."""
    steps = stage.Config().steps * options.scale
    if name == "finetune-easy-longer":
        minutes = []
        for run_ in ("finetune", "finetune-easy"):
            train(
                RUNS, run_, folder, partial(arguments_of, folder=folder, seed=seed, options=options)
            )
            minutes.append(float((folder / f"{run_}.minutes").read_text()))
        steps *= minutes[0] / minutes[1]
    return [
        f"--data={options.data}",
        f"--steps={max(2, round(steps))}",
        f"--seed={seed}",
        "--eval-every=0",
    ]


def main(arguments):
    options, _ = read_options(Options, arguments)
    tasks = Retrieval.open_all(options.data, "test")
    rows = {row: name for row, name in ROWS.items() if row.startswith(options.rows)}
    results = {row: [] for row in rows}
    for seed in range(options.seeds):
        folder = Path(options.out, str(seed))
        folder.mkdir(parents=True, exist_ok=True)
        for row, name in rows.items():
            others = partial(arguments_of, folder=folder, seed=seed, options=options)
            scores = {"minutes": train(RUNS, name, folder, others)}
            model = NomicBert.from_pretrained(folder / name, device=best_device())
            for task in tasks:
                ranking, _ = task.rank(model, model.config.trained_length)
                scores[task.name] = statistics.mean(task.scores(ranking)["nDCG@10"])
            results[row].append(scores)
        evaluate.save_results(options.out, "ablations", results)
        print_table(results, [task.name for task in tasks], seed + 1)


def print_table(results, tasks, seeds):
    print(f"\nnDCG@10 on test, mean and standard deviation of {seeds} seeds\n")
    print(f"| | {' | '.join(tasks)} | minutes |\n|---|{'---|' * len(tasks)}---|")
    for row, runs in results.items():
        cells = []
        for task in tasks:
            values = [scores[task] for scores in runs]
            spread = f" ±{statistics.stdev(values):.3f}" if seeds > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        minutes = statistics.mean(scores["minutes"] for scores in runs)
        print(f"| {row} | {' | '.join(cells)} | {minutes:.1f} |")


if __name__ == "__main__":
    run(main)
