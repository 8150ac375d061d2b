"""Do filtering and the rule for false negatives help? Both are tried on data with planted faults.

    python bench/filtering.py                # one seed; 50 minutes on two cores, as short runs say
    python bench/filtering.py --scale=0.25   # a quarter of the steps of both stages: 25 minutes

Filtering: 30% more pairs are added to two sources of stage 2, each a query with the document of
another. Who finds them again? Two judges: the model of stage 2 that was trained on the clean data
(--model), and, as in real life, one that knows only the polluted data. Stage 2 is then trained from
random weights on what each keeps.

Mining: 30% of the rows of stage 3 get a second row that says nearly the same, query and document
with a tenth of their words left out. So each of these documents answers a query that it is not
marked for. Stage 3 is trained with and without the rule that drops likely answers, on this data and
on the data as it is.

Runs lie in OUT; one that is complete is not run again, so that an interrupted bench goes on. The
tables are nDCG@10 on dev and test, the mean over the seeds.
"""

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import finetune
from data import filter as filtering
from data.prepare import whole_or_nothing, write_pairs
from data.store import load_tokenizer
from model import NomicBert
from options import InputError, read_options, run
from retrieval import Retrieval

# row of the table -> its data folder. Filtered folders: name -> (the judge, the best that stay)
FILTERING = {
    "clean": "clean",
    "with 30% shuffled pairs": "polluted",
    "filtered by the model of the shuffled data: top 2": "own-2",
    "filtered by the model of the shuffled data: top 20": "own-20",
    "filtered by the model of the clean data: top 2": "model-2",
}
MINING = {  # row -> (its data folder, options of stage 3)
    "as it is: no negatives": ("clean", ["--negatives=0"]),
    "as it is: no rule": ("clean", ["--margin=inf"]),
    "as it is: below the right one": ("clean", ["--margin=1"]),
    "as it is: below 0.95 of it": ("clean", ["--margin=0.95"]),
    "as it is: BM25 and below the right one": ("clean", ["--miner=bm25"]),
    "planted: no rule": ("planted", ["--margin=inf"]),
    "planted: below the right one": ("planted", ["--margin=1"]),
    "planted: below 0.95 of it": ("planted", ["--margin=0.95"]),
}
EXTRA = {"filtering": ["recall", "precision", "good lost"], "mining": ["planted left"]}


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    model: str = "out/contrastive"  # a model of stage 2, trained on it
    out: str = "out/filtering"  # for data folders and runs
    sources: str = "name-docstring,summary-code"  # of stage 2, to pollute and to train on
    share: float = 0.3  # of rows that are added
    seeds: int = 1  # how often to train
    scale: float = 1.0  # of the steps of stages 2 and 3: 0.1 for a quick look
    rows: str = ""  # only rows whose name begins so; several, with commas between them


# ------------------------------------------------------------------------------------------------
# Data with planted faults


def read_source(folder):
    """(pairs, prefixes) of a source."""
    meta = json.loads((folder / "meta.json").read_text())
    pairs = list(filtering.read_pairs(folder / "pairs.jsonl", meta["rows"]))
    prefixes = tuple(meta["prefixes"][side] for side in ("query", "document"))
    return [(pair["query"], pair["document"]) for pair in pairs], prefixes


def shuffled_pairs(pairs, count, rng):
    """Queries drawn at random, each with the document of the next."""
    drawn = rng.permutation(len(pairs))[:count]
    return [(pairs[i][0], pairs[j][1]) for i, j in zip(drawn, np.roll(drawn, 1), strict=True)]


def near_copies(pairs, count, rng):
    """Pairs drawn at random, without a tenth of their words, and at least one."""

    def shortened(text):
        words = text.split()
        gone = rng.permutation(len(words))[: max(1, len(words) // 10)]
        return " ".join(np.delete(np.array(words, object), gone))

    drawn = rng.permutation(len(pairs))[:count]
    return drawn, [tuple(map(shortened, pairs[i])) for i in drawn]


def make_folder(name, options):
    """A data folder: of stage 2 the chosen sources, and what `name` says; all else is linked."""
    data, out = Path(options.data), Path(options.out, "data", name)
    if out.is_dir():
        return out
    if name not in ("clean", "polluted", "planted"):
        who, top = name.split("-")
        judge = options.model if who == "model" else train("polluted", 0, options)
        folder = make_folder("polluted", options)
        length = contrastive.Config.document_tokens  # judged is what training reads
        how = [f"--judge={judge}", f"--top={top}", f"--max-tokens={length}"]
        filtering.main([str(folder), f"--out={out}", *how])
        return out
    tokenizer, rng = load_tokenizer(data), np.random.default_rng(0)
    chosen = [f"stage2/{source}" for source in options.sources.split(",")]
    faulty = {"clean": [], "polluted": chosen, "planted": ["stage3/summary-body"]}[name]
    with whole_or_nothing(out) as folder:
        for path in sorted(path for path in data.rglob("*") if path.is_file()):
            place = path.relative_to(data)
            source = "/".join(place.parts[:2])
            if source in faulty or (place.parts[0] == "stage2" and source not in chosen):
                continue
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            filtering.link(path, folder / place)
        for source in faulty:
            pairs, prefixes = read_source(data / source)
            count = round(options.share * len(pairs))
            if name == "polluted":
                added = shuffled_pairs(pairs, count, rng)
            else:
                drawn, added = near_copies(pairs, count, rng)
                np.save(folder / "planted.npy", drawn)
            write_pairs(folder / source, pairs + added, prefixes, tokenizer)
    return out


# ------------------------------------------------------------------------------------------------
# Runs


def train(name, seed, options):
    """A run of stage 2, from random weights, on a data folder; its directory."""
    out = Path(options.out, "runs", f"{name}-{seed}")
    run_once(contrastive, name, out, [f"--seed={seed}"], options)
    return out


def run_once(stage, name, out, arguments, options):
    if not (out / "done").is_file():
        data, steps = (
            make_folder(name, options),
            max(2, round(stage.Config().steps * options.scale)),
        )
        arguments = [*arguments, f"--steps={steps}", "--eval-every=0", "--log-every=50"]
        stage.main([f"--data={data}", f"--out={out}", *arguments])
        (out / "done").touch()


def scores(directory, options):
    """nDCG@10 of each task: on dev, and on test."""
    path = directory / "scores.json"
    if not path.is_file():
        model, found = NomicBert.from_pretrained(directory), {}
        both = [Retrieval.open_all(options.data, split) for split in ("dev", "test")]
        for dev, test in zip(*both, strict=True):
            first = len(test.queries)
            test.queries += dev.queries  # of the same documents, which are embedded once
            test.relevant += dev.relevant
            ranking, _ = test.rank(model, model.config.trained_length)
            values = test.scores(ranking)["nDCG@10"]
            found[f"{test.name}, dev"] = statistics.mean(values[first:])
            found[f"{test.name}, test"] = statistics.mean(values[:first])
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------
# Tables


def caught(name, options):
    """Of a filtered folder: the share of shuffled pairs that were thrown away (recall), the share
    of shuffled ones among the pairs thrown away (precision), and the share of good ones lost."""
    shuffled_gone = shuffled = gone = good = 0
    for source in options.sources.split(","):
        folders = [make_folder(which, options) for which in ("polluted", name)]
        before, kept = (
            Path(folder, "stage2", source, "pairs.jsonl").read_text("utf-8").split("\n")[:-1]
            for folder in folders
        )
        clean = len(read_source(Path(options.data, "stage2", source))[0])
        rest = iter([*kept, None])
        following, thrown = next(rest), []
        for line in before:  # what was kept is in the same order
            thrown.append(line != following)
            following = following if thrown[-1] else next(rest)
        shuffled_gone += sum(thrown[clean:])
        shuffled += len(before) - clean
        gone += sum(thrown)
        good += clean
    return shuffled_gone / shuffled, shuffled_gone / gone, (gone - shuffled_gone) / good


def planted_left(out, options):
    """Of the planted copies, the share that stands among the mined negatives of the query that they
    answer."""
    folder = make_folder("planted", options)
    drawn = np.load(folder / "planted.npy")
    mined = np.load(out / "negatives.npz")["summary-body"]
    copies = len(mined) - len(drawn) + np.arange(len(drawn))
    return float((mined[drawn] == copies[:, None]).any(1).mean())


def print_table(title, rows, columns):
    """rows: name -> for each seed a dictionary of its numbers."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row, runs in rows.items():
        cells = [[found[column] for found in runs if column in found] for column in columns]
        cells = [f"{statistics.mean(values):.3f}" if values else "" for values in cells]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def main(arguments):
    options, _ = read_options(Options, arguments)
    if not Path(options.model, "model.safetensors").is_file():
        raise InputError(f"no model in {options.model}: python contrastive.py --init=out/mlm")
    asked = tuple(options.rows.split(","))
    tables = {"filtering": {}, "mining": {}}
    for row, name in FILTERING.items():
        if row.startswith(asked):
            found = [scores(train(name, seed, options), options) for seed in range(options.seeds)]
            if "-" in name:
                found[0] |= dict(zip(EXTRA["filtering"], caught(name, options), strict=True))
            tables["filtering"][row] = found
    for row, (name, own) in MINING.items():
        if row.startswith(asked):
            tables["mining"][row] = found = []
            for seed in range(options.seeds):
                out = Path(options.out, "runs", f"{re.sub('[: ]+', '-', row)}-{seed}")
                begin = [f"--seed={seed}", f"--init={options.model}", *own]
                run_once(finetune, name, out, begin, options)
                found.append(scores(out, options))
                if name == "planted":
                    found[-1]["planted left"] = planted_left(out, options)
    for title, extra in EXTRA.items():
        measured = next((list(runs[0]) for runs in tables[title].values()), [])
        print_table(title, tables[title], [*extra, *(m for m in measured if m not in extra)])


if __name__ == "__main__":
    run(main)
