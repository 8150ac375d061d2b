"""The paper in miniature: does each stage add something, on real public text?

    bash bench/miniature.sh SOURCES --dry-run            # what would it take?
    bash bench/miniature.sh SOURCES                      # on one GPU
    bash bench/miniature.sh SOURCES --size=laptop        # on two cores

bench/miniature_data.py makes the data folder, and says of what. Here a model goes through the three
stages, others through all but one part of it, and every one is measured on public tasks that no
training saw:

    SciFact    claims -> abstracts that say something about them (BEIR)
    Amazon     questions -> the reviews in which they are answered
    STS        the cosine of two sentences against people's judgement (STS Benchmark, dev)
    QMSum      questions -> meetings of 9,000 words, read to several lengths, with each scaling of
               RoPE

What is kept of stage 2's pairs by the consistency filter, is decided by a model of the same size,
which was trained on all of them. Results are written after every row; the same command goes on
where a run was cut short.
"""

import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablations import train
from miniature_data import STS, TASKS, check_sources, prepare
from miniature_report import RETRIEVAL, about, draw, report
from stages import matrix_rate

import common
import contrastive
import evaluate
import finetune
import mlm
from data import filter as consistency
from estimate import PEAKS, SHARE, step_of
from model import NomicBert, fast_dtype
from options import InputError, read_options, run
from processes import best_device
from retrieval import Retrieval, bm25_rank, summary
from similarity import sts

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
RUNS = {  # name -> (stage, the run that it starts from, its own options)
    "mlm": (mlm, "", ()),
    "unfiltered": (contrastive, "mlm", ()),  # and so the filter's judge
    "contrastive": (contrastive, "mlm", ()),
    "finetune": (finetune, "contrastive", ("--matryoshka",)),
    "contrastive-without-1": (contrastive, "", ()),
    "finetune-without-1": (finetune, "contrastive-without-1", ("--matryoshka",)),
    "finetune-without-2": (finetune, "mlm", ("--matryoshka",)),
    "finetune-easy": (finetune, "contrastive", ("--matryoshka", "--negatives=0")),
    "finetune-unfiltered": (finetune, "unfiltered", ("--matryoshka",)),
}
ROWS = {  # row of the table -> the run that it shows; two begin from mlm and train nothing
    "random weights": "random",
    "random weights, words of stage 1": "words",
    "after stage 1, masked words": "mlm",
    "after stage 2, weak pairs": "contrastive",
    "after stage 3, hard negatives": "finetune",
    "without stage 1, after stage 2": "contrastive-without-1",
    "without stage 1, after stage 3": "finetune-without-1",
    "without stage 2": "finetune-without-2",
    "without hard negatives, equal steps": "finetune-easy",
    "without consistency filtering": "finetune-unfiltered",
}
MAIN = list(ROWS)[:7]  # what further seeds repeat
LENGTHS = (512, 2048, 4096, 8192)  # of QMSum's meetings, in tokens


TINY = ("--num-hidden-layers=1", "--hidden-size=64", "--num-attention-heads=1")
TINY += ("--intermediate-size=64",)
PAIRS = ("--trained-length=512", "--document-tokens=512", "--tokens-in-memory=131072")
FEW = ("--trained-length=512", "--batch-size=4", "--steps=2")
SIZES = {  # size -> articles of Wikipedia, and the options of each stage
    "gpu": (
        100_000,
        {
            "mlm": ("--preset=gpu", "--seq-len=2048", "--batch-size=64", "--steps=2000"),
            "contrastive": ("--preset=gpu", "--trained-length=2048"),
            "finetune": ("--preset=gpu", "--trained-length=2048"),
        },
    ),
    "laptop": (
        4000,
        {
            "mlm": ("--seq-len=512", "--batch-size=16", "--steps=700"),
            "contrastive": (*PAIRS, "--steps=200"),
            "finetune": (*PAIRS, "--batch-size=256"),
        },
    ),
    "tiny": (
        100,
        {
            "mlm": (*TINY, "--seq-len=512", "--batch-size=2", "--steps=2"),
            "contrastive": (*TINY, *FEW),
            "finetune": (*TINY, *FEW),
        },
    ),
}


@dataclass
class Options:
    size: str = "gpu"  # gpu; laptop, for two cores; or tiny, to see in a minute that it ends
    out: str = "out/miniature"  # for data, runs and results
    report: str = ""  # the file to write, with a picture beside it; empty: bench/MINIATURE.md
    seeds: int = 1  # how often the main rows are run
    scale: float = 1.0  # of the steps of every stage: 0.1 for a quick look
    vocab_size: int = 16_384  # of the tokenizer
    dry_run: bool = False  # train nothing, and print what the runs would take


# ------------------------------------------------------------------------------------------------
# Runs


def config_of(name, seed, options, data):
    """(the options of a run, but its own in RUNS; the Config that all of them make)."""
    stage, _, own = RUNS[name]
    arguments = list(SIZES[options.size][1][stage.__name__])
    config, _ = read_options(stage.Config, arguments, stage.PRESETS)
    steps = max(2, round(config.steps * options.scale))
    scores = max(1, steps // 4) if stage is mlm else 0  # the others' take longer than a step
    arguments += [f"--steps={steps}", f"--save-every={max(1, steps // 4)}"]
    arguments += [f"--eval-every={scores}", f"--log-every={max(1, steps // 100)}"]
    arguments += [f"--seed={seed}", f"--data={data}"]
    return arguments, read_options(stage.Config, [*arguments, *own], stage.PRESETS)[0]


def data_of(name, options):
    """The data folder of a run: the filtered one, but of those that come before the filter."""
    unfiltered = ("mlm", "unfiltered", "finetune-unfiltered")
    return Path(options.out, "data" if name in unfiltered else "filtered")


def filter_pairs(options):
    """Writes the filtered data, unless it is there. Its judge reads what stage 2 reads."""
    filtered = data_of("contrastive", options)
    if not (filtered / "meta.json").is_file():
        began = time.perf_counter()
        longest = config_of("unfiltered", 0, options, "")[1].document_tokens
        judge = f"--judge={Path(options.out, '0', 'unfiltered')}"
        data = str(data_of("unfiltered", options))
        consistency.main([data, judge, f"--out={filtered}", f"--max-tokens={longest}"])
        minutes = (time.perf_counter() - began) / 60
        Path(options.out, "filtered.minutes").write_text(str(minutes))


def train_run(name, seed, options):
    """Trains a run and what it starts from, unless they are there. Returns minutes, of all."""
    directory = Path(options.out, str(seed))
    directory.mkdir(parents=True, exist_ok=True)

    def arguments_of(_, name):
        begun = (directory / name / "state.pt").is_file()
        arguments, _ = config_of(name, seed, options, data_of(name, options))
        return arguments + ["--resume"] * begun

    return train(RUNS, name, directory, arguments_of)


def plan(options):
    """Prints tokens, operations and minutes of every run, before any."""
    data, device = Path(options.out, "data"), best_device()
    there = (data / "meta.json").is_file()
    rates = {"one H100": PEAKS["H100"]}
    if device.type == "cpu":
        shape = step_of("mlm", config_of("mlm", 0, options, data)[1]).shape
        rates["this CPU"] = matrix_rate(shape, fast_dtype(device))
    print(f"lengths of texts: {'those of ' if there else 'assumed, as there is no '}{data}")
    print(f"minutes at {SHARE:.0%} of the peak; a CPU's peak is the rate of matrix products\n")
    print(
        f"{'run':24}{'steps':>8}{'tokens':>12}{'operations':>12}"
        + "".join(map("{:>12}".format, rates))
    )
    total = 0.0
    for name, (stage, _, _) in RUNS.items():
        config = config_of(name, 0, options, data)[1]
        step = step_of(stage.__name__, config)
        cached = step.tokens > getattr(config, "tokens_in_memory", math.inf)
        operations = config.steps * step.operations * (4 / 3 if cached else 1)  # GradCache's
        total += operations
        print(f"{name:24}{config.steps:8,}{config.steps * step.tokens:12.2e}", end="")
        print_minutes(operations, rates)
    print(f"{'in all':44}", end="")
    print_minutes(total, rates)
    print("\nFiltering, mining and evaluation come on top.")


def print_minutes(operations, rates):
    minutes = (operations / (SHARE * rate) / 60 for rate in rates.values())
    print(f"{operations:12.2e}" + "".join(map("{:12.1f}".format, minutes)))


# ------------------------------------------------------------------------------------------------
# Scores


def scored(values):
    """Mean and standard error over queries, and each query's value, to compare rows with."""
    return {**summary(values), "values": [round(float(value), 4) for value in values]}


def scores_of(model, tasks, source, length, dims=None):
    """nDCG@10 on SciFact and Amazon, Spearman on STS."""
    scores = {}
    for name in RETRIEVAL:
        ranking, cosines = tasks[name].rank(model, length, dims=dims)
        scores[name] = scored(tasks[name].scores(ranking)["nDCG@10"])
        scores[name]["cosines"] = cosines  # of right and of random documents
    scores["STS"] = {"mean": float(sts(model, source / STS, length, dims)["Spearman"])}
    return scores


def random_model(trained):
    """Random weights in the shape of a trained model."""
    model = NomicBert(trained.config).to(trained.device)
    model.tokenizer, model.dtype = trained.tokenizer, trained.dtype
    return model


def cut(task, tokenizer, tokens):
    """The task with its documents' text cut to a length, as the model reads them."""
    short = copy.copy(task)
    room = tokens - len(tokenizer.encode(task.prefixes["document"]))  # with [CLS] and [SEP]
    ends = [
        e.offsets[room - 1][1] if len(e) > room else None
        for e in tokenizer.encode_batch(task.documents, add_special_tokens=False)
    ]
    short.documents = [text[:end] for text, end in zip(task.documents, ends, strict=True)]
    return short


def long_texts(model, task, results, keep):
    """QMSum's nDCG@10 by length, BM25 and each scaling of RoPE. Up to the trained length all four
    are the same."""
    trained, table = model.config.trained_length, results.setdefault("long", {})
    for tokens in LENGTHS:
        ranking = bm25_rank(cut(task, model.tokenizer, tokens))
        table.setdefault("BM25", {})[str(tokens)] = scored(task.scores(ranking)["nDCG@10"])
        found = None
        for name, rope in evaluate.scalings(tokens / trained).items():
            if tokens > trained or found is None:
                model.rope = dataclasses.replace(model.rope, **rope)
                ranking, _ = task.rank(model, tokens)
                found = scored(task.scores(ranking)["nDCG@10"])
            table.setdefault(name, {})[str(tokens)] = found
            keep()


def speed_of(name, options, device):
    """Of a run of seed 0: tokens/s, as a share of the rate of matrix products too, and minutes."""
    log = read_log(name, options)
    step = step_of(name, config_of(name, 0, options, data_of(name, options))[1])
    speed = statistics.median(record["tokens_per_second"] for record in log)
    N = 8192 if device.type == "cpu" else 65_536
    rate = matrix_rate(step.shape, fast_dtype(device), device, N)
    minutes = float(Path(options.out, "0", f"{name}.minutes").read_text())
    return {
        "steps": log[-1]["step"],
        "tokens_per_second": speed,
        "share": speed * step.operations / step.tokens / rate,
        "rate": rate,
        "minutes": minutes,
    }


def read_log(name, options):
    return [json.loads(line) for line in open(Path(options.out, "0", name, "log.jsonl"))]


# ------------------------------------------------------------------------------------------------


def measure_rows(results, tasks, source, seed, options, keep):
    """Trains what each row needs, and scores it, unless that is done."""
    train_run("unfiltered", 0, options)
    filter_pairs(options)
    for row, name in ROWS.items():
        done = results["rows"].setdefault(row, [])
        if len(done) > seed or (seed and row not in MAIN):
            continue
        run_ = name if name in RUNS else "mlm"
        minutes = train_run(run_, seed, options)
        model = NomicBert.from_pretrained(Path(options.out, str(seed), run_), device=best_device())
        torch.manual_seed(seed)
        if name == "random":
            model, minutes = random_model(model), 0.0
        elif name == "words":  # what stage 2 begins with, on a laptop
            contrastive.keep_only_embeddings(model)
        length = min(512, model.config.trained_length)
        done.append({**scores_of(model, tasks, source, length), "minutes": minutes})
        keep()


def measure_final(results, tasks, source, options, keep):
    """Of the last stage's model: speed and curves, Matryoshka dimensions, long texts."""
    device = best_device()
    model = NomicBert.from_pretrained(Path(options.out, "0", "finetune"), device=device)
    length = results["trained"] = model.config.trained_length
    draw({stage: read_log(stage, options) for stage in STAGES}, Path(options.report))
    if "speed" not in results:
        results["speed"] = {name: speed_of(name, options, device) for name in STAGES}
    if "dims" not in results:
        sizes = finetune.matryoshka_sizes(model.config.hidden_size)
        results["dims"] = {
            str(dims): scores_of(model, tasks, source, min(512, length), dims) for dims in sizes
        }
        keep()
    if str(LENGTHS[-1]) not in results.get("long", {}).get("Dynamic NTK", {}):
        long_texts(model, tasks["QMSum"], results, keep)


def main(arguments):
    words = [argument for argument in arguments if not argument.startswith("--")]
    given = [argument for argument in arguments if argument.startswith("--")]
    options, _ = read_options(Options, given)
    options.report = options.report or str(Path(__file__).with_name("MINIATURE.md"))
    if options.size not in SIZES:
        raise InputError(f"--size={options.size}: give {', '.join(SIZES)}")
    if options.dry_run:
        return plan(options)
    source = check_sources(words)
    prepare(source, Path(options.out), SIZES[options.size][0], options.vocab_size)
    path = Path(options.out, "results.json")
    results = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    sizes = {"size": options.size, "scale": options.scale, "vocab_size": options.vocab_size}
    if results.setdefault("sizes", sizes) != sizes:
        raise InputError(f"{path} is of another size, {results['sizes']}: give another --out")
    command = " ".join(["bash bench/miniature.sh SOURCES", *given])

    def keep():
        results["about"] = about(command, options.size, options.seeds, options.out)
        common.replace(path, lambda temporary: temporary.write_text(json.dumps(results)))
        report(results, Path(options.report))

    tasks = {
        name: Retrieval(source / "retrieval" / folder, "dev") for name, folder in TASKS.items()
    }
    if "BM25" not in results["rows"]:
        bm25 = {n: scored(tasks[n].scores(bm25_rank(tasks[n]))["nDCG@10"]) for n in RETRIEVAL}
        results["rows"]["BM25"] = [{**bm25, "minutes": 0.0, "seedless": True}]
        keep()
    for seed in range(options.seeds):
        measure_rows(results, tasks, source, seed, options, keep)
        if seed == 0:
            measure_final(results, tasks, source, options, keep)
    keep()
    print(Path(options.report).read_text())


if __name__ == "__main__":
    run(main)
