"""How good is it? Retrieval, masked words, long texts; and a search, to try it by hand.

    python evaluate.py                        # the ladder: BM25, random weights, each stage's model
    python evaluate.py search "how do I read a csv file"     # the ten best; no query: a prompt
    python evaluate.py long                   # beyond the trained length, four ways to scale RoPE
    python evaluate.py plot                   # learning curves, ladder, length curves as PNG

and on texts from elsewhere, with any checkpoint (--model=DIR, or a name on the hub):

    python evaluate.py sts FILE               # pairs of sentences with scores, csv or tsv
    python evaluate.py retrieval FOLDER       # a task in the BEIR layout, beside BM25
    python evaluate.py mteb --tasks=A,B       # MTEB's tasks by their names, or files and folders

The metrics are in retrieval.py and similarity.py, masked accuracy is in mlm.py. The ladder and long
texts are measured on modules that were held out from all training. Results go to out/results.json,
and into the model card of the checkpoint that they are of.
"""

import dataclasses
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
from card import write_card
from checkpoint import find
from data import store
from mlm import held_out_scores
from model import NomicBert, NomicBertForMaskedLM
from options import InputError, read_options, run
from processes import best_device
from retrieval import METRICS, Retrieval, bm25_rank, summary
from search import Index, typed_queries
from similarity import read_pairs, sts

STAGES = ("mlm", "contrastive", "finetune")


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    out: str = "out"  # where the stages' runs are; results.json and pictures go there too
    model: str = ""  # a checkpoint directory or a name on the hub; empty: the last stage trained
    split: str = "test"  # the ladder's held-out modules: test, or dev while tuning
    max_tokens: int = 0  # texts are cut to this length; 0: the length that the model was trained at
    dims: int = 0  # sts, retrieval, mteb: only the first dimensions, after Matryoshka; 0: all
    rope_factor: float = 0.0  # sts, retrieval, mteb: Dynamic NTK with this s; 0: as it is saved
    tasks: str = ""  # mteb: names of tasks, files of pairs, folders in the BEIR layout, with commas
    seed: int = 0  # of the random weights


# ------------------------------------------------------------------------------------------------
# The ladder


def ladder(options):
    """BM25, random weights, and the model after each stage, on the same held-out queries."""
    tasks = Retrieval.open_all(options.data, options.split)
    rows = {}
    for name, split_identifiers in (("BM25", False), ("BM25, identifiers split", True)):
        try:
            rankings = {task.name: (bm25_rank(task, split_identifiers), None) for task in tasks}
        except ImportError:
            print(f"{name}: not measured; pip install -r requirements-extra.txt")
            continue
        rows[name] = row_of(tasks, rankings)
    for name, model, directory in models_of(options):
        length = options.max_tokens or model.config.trained_length
        rows[name] = row_of(tasks, {task.name: task.rank(model, length) for task in tasks})
        for task in tasks if directory else ():
            title = f"{options.split} split of {task.name}, among {len(task.documents):,} documents"
            record(directory, title, means(rows[name][task.name]))
    save_results(options.out, "ladder", rows)
    print_ladder(rows, [task.name for task in tasks])
    if Path(options.out, "mlm").is_dir():
        words = masked_words(options)
        save_results(options.out, "masked", words)
        print(
            f"\nafter mlm, {words['tokens']:,} masked tokens of {options.split} text: accuracy "
            f"{words['accuracy']['mean']:.3f} ±{words['accuracy']['error']:.3f}, "
            f"perplexity {words['perplexity']:.1f}"
        )


def row_of(tasks, rankings):
    row = {}
    for task in tasks:
        ranking, cosines = rankings[task.name]
        row[task.name] = {name: summary(values) for name, values in task.scores(ranking).items()}
        if cosines:
            row[task.name] |= dict(
                zip(("cosine of pairs", "cosine at random"), cosines, strict=True)
            )
    return row


def models_of(options):
    """(name of the row, model, its directory): random weights, and each stage that was trained."""
    trained = [stage for stage in STAGES if Path(options.out, stage, "model.safetensors").is_file()]
    if not trained:
        raise InputError(f"nothing was trained in {options.out}: python mlm.py, or make demo")
    for stage in trained:
        model = NomicBert.from_pretrained(Path(options.out, stage), device=best_device())
        if stage == trained[0]:
            torch.manual_seed(options.seed)
            untrained = NomicBert(model.config)
            untrained.to(model.device)
            untrained.tokenizer, untrained.dtype = model.tokenizer, model.dtype
            yield "random weights", untrained, None
        yield f"after {stage}", model, Path(options.out, stage)


def masked_words(options):
    """Stage 1's model on held-out text: how many of the masked tokens it finds, and perplexity."""
    model = NomicBertForMaskedLM.from_pretrained(Path(options.out, "mlm"), device=best_device())
    folder = f"{options.data}/stage1/{options.split}"
    texts = store.Sequences(folder, model.bert.tokenizer, model.config.trained_length)
    loss, hit = held_out_scores(model, [texts[i] for i in range(len(texts))])
    return {"accuracy": summary(hit), "perplexity": math.exp(loss.mean()), "tokens": len(loss)}


def means(row):
    return {metric: value["mean"] for metric, value in row.items() if isinstance(value, dict)}


def record(directory, title, values):
    """Adds results to a checkpoint that a run of ours wrote, for its model card."""
    if Path(directory, "run.json").is_file():
        save_results(directory, title, values)
        write_card(directory)


def save_results(out, key, value):
    """Sets one entry of OUT/results.json and keeps the others."""
    path = Path(out, "results.json")
    results = json.loads(path.read_text()) if path.is_file() else {}
    text = json.dumps({**results, key: value}, indent=1)
    common.replace(path, lambda temporary: temporary.write_text(text))


def print_ladder(rows, tasks):
    print(f"\n{'':24}" + "".join(f"{task:^48}" for task in tasks))
    print(
        f"{'':24}" + f"{'nDCG@10':>14}{'MRR@10':>9}{'recall':>8}{'cos + / random':>17}" * len(tasks)
    )
    for name, row in rows.items():
        print(f"{name:24}", end="")
        for scores in (row[task] for task in tasks):
            print(f"{scores['nDCG@10']['mean']:8.3f} ±{scores['nDCG@10']['error']:.3f}", end="")
            print("".join(f"{scores[key]['mean']:9.3f}" for key in ("MRR@10", "recall@10")), end="")
            cosines = [scores[key] for key in scores if key.startswith("cosine")]
            print(f"{' / '.join(f'{cosine:.2f}' for cosine in cosines):>16}", end="")
        print()


# ------------------------------------------------------------------------------------------------
# Beyond the trained length


def scalings(times):
    """Ways to read a text of `times` the trained length. Linear and NTK must be told how long it
    is; Dynamic NTK sees for itself."""
    return {
        "plain RoPE": {"scaling": "none"},
        "linear": {"scaling": "linear", "factor": float(times)},
        "NTK": {"scaling": "ntk", "factor": float(times)},
        "Dynamic NTK": {"scaling": "dynamic", "factor": 2.0},
    }


def long(options, times=(1, 2, 4, 8, 16)):
    """Masked accuracy after stage 1, and retrieval of long documents by the last stage's model, at
    1, 2, ... 16 times the trained length."""
    masked = NomicBertForMaskedLM.from_pretrained(Path(options.out, "mlm"), device=best_device())
    encoder = NomicBert.from_pretrained(last_stage(options.out), device=best_device())
    length = masked.config.trained_length
    column = store.Source(f"{options.data}/stage1/long", masked.bert.tokenizer).columns["document"]
    longest = length * max(times)
    windows = [
        ids[i : i + longest].astype(np.int64)
        for ids in (column[row] for row in range(len(column)))
        for i in range(0, len(ids) - longest + 1, longest)
    ]
    task = Retrieval(Path(options.data, "long", "pages"), "test")
    print(f"{len(windows)} windows of {longest} held-out tokens: the same masks at every length")
    print(f"{len(task.queries)} queries, {len(task.documents)} long documents cut to each length\n")
    print(f"{'':14}{'length':>8}{'masked accuracy':>20}{'loss':>8}{'nDCG@10':>20}")
    table = {}
    for name in scalings(1):
        for n in times:
            masked.bert.rope = dataclasses.replace(masked.bert.rope, **scalings(n)[name])
            encoder.rope = dataclasses.replace(encoder.rope, **scalings(n)[name])
            loss, hit = held_out_scores(masked, windows, piece=n * length)
            rankings, _ = task.rank(encoder, n * length)
            row = {"accuracy": hit, "loss": loss, "nDCG@10": task.scores(rankings)["nDCG@10"]}
            row = {metric: summary(values) for metric, values in row.items()}
            table.setdefault(name, {})[n * length] = row
            accuracy, ndcg = (
                f"{row[m]['mean']:.3f} ±{row[m]['error']:.3f}" for m in ("accuracy", "nDCG@10")
            )
            print(
                f"{name:14}{n * length:8}{accuracy:>20}{row['loss']['mean']:8.3f}{ndcg:>20}",
                flush=True,
            )
    save_results(options.out, "long", {"trained length": length, "table": table})


# ------------------------------------------------------------------------------------------------
# Texts from elsewhere


def open_model(options):
    """(model, its directory, the length that texts are cut to)."""
    directory = find(options.model) if options.model else last_stage(options.out)
    factor = options.rope_factor or None
    model = NomicBert.from_pretrained(directory, rope_factor=factor, device=best_device())
    return model, directory, options.max_tokens or model.config.trained_length


def similarity_of_pairs(options, path):
    """Spearman and Pearson on a file of scored pairs."""
    read_pairs(path)  # a mistake there shows itself before the model is opened
    model, directory, length = open_model(options)
    scores = sts(model, path, length, options.dims or None)
    print(
        f"{Path(path).name}, {scores['pairs']:,} pairs: "
        f"Spearman {scores['Spearman']:.4f}, Pearson {scores['Pearson']:.4f}"
    )
    save_results(options.out, f"sts {path}", scores)
    record(directory, f"similarity of the pairs in {Path(path).name}", scores)


def retrieval_of_folder(options, folder):
    """nDCG and its like on each split of a task in the BEIR layout, beside BM25."""
    splits = sorted(path.name.split(".")[0] for path in Path(folder, "qrels").glob("*.tsv*"))
    if not splits:
        raise InputError(f"{folder} has no qrels/*.tsv: a task has the layout in retrieval.py")
    tasks = {split: Retrieval(folder, split) for split in splits}
    model, directory, length = open_model(options)
    for split, task in tasks.items():
        sizes = f"{len(task.queries):,} queries, {len(task.documents):,} documents"
        print(f"{task.name}, {split}: {sizes}")
        print(f"{'':20}" + "".join(f"{metric:>17}" for metric in METRICS))
        rankings = {}
        if importlib.util.find_spec("bm25s"):
            rankings["BM25"] = bm25_rank(task)
        rankings[str(directory)], _ = task.rank(model, length, dims=options.dims or None)
        for name, ranking in rankings.items():
            row = {metric: summary(values) for metric, values in task.scores(ranking).items()}
            cells = (f"{value['mean']:.4f} ±{value['error']:.4f}" for value in row.values())
            print(f"{name[-19:]:20}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
            save_results(options.out, f"retrieval {folder} {split} {name}", row)
        record(directory, f"{split} split of {task.name}", means(row))


def benchmark(options):
    """Tasks of MTEB, by its own library."""
    if not options.tasks:
        raise InputError("mteb: give --tasks=STSBenchmark,SciFact, or files and folders")
    try:
        from mteb_run import run_mteb
    except ImportError:
        raise InputError("mteb is not installed: pip install -r requirements-test.txt") from None
    model, directory, length = open_model(options)
    name = options.model or str(directory)
    tasks = options.tasks.split(",")
    for task, splits in run_mteb(
        model, name, tasks, options.out, length, options.dims or None
    ).items():
        for split, subsets in splits.items():
            score = float(np.mean([scores["main_score"] for scores in subsets]))
            print(f"{task:30}{split:8}main score {score:.4f}")
            record(directory, f"MTEB {task}, {split}", {"main score": score})
    print(f"all scores, in mteb's layout: {options.out}/mteb/results/")


# ------------------------------------------------------------------------------------------------
# Search


def last_stage(out):
    """The directory of the last stage that was trained."""
    for stage in reversed(STAGES):
        if Path(out, stage, "model.safetensors").is_file():
            return Path(out, stage)
    raise InputError(f"nothing was trained in {out}: make demo, or --model=DIR")


def search(options, query):
    """Prints the ten best documents; without a query, asks for queries until an empty line."""
    directory = find(options.model) if options.model else last_stage(options.out)
    index = Index(directory, options.data, options.max_tokens)
    for asked in typed_queries() if query is None else [query]:
        for score, name, text in index.search(asked):
            text = " ".join(text.removeprefix(name).split())
            print(f"{score:.3f}  {name}\n       {text[:90]}")


# ------------------------------------------------------------------------------------------------


def main(arguments):
    words = [argument for argument in arguments if not argument.startswith("--")]
    options, _ = read_options(Options, [a for a in arguments if a.startswith("--")])
    command = words.pop(0) if words else "ladder"
    if command == "search":
        search(options, " ".join(words) if words else None)
    elif command in ("sts", "retrieval") and len(words) == 1:
        {"sts": similarity_of_pairs, "retrieval": retrieval_of_folder}[command](options, words[0])
    elif command == "plot" and not words:
        from plots import plot_all

        print("\n".join(f"wrote {path}" for path in plot_all(options.out)))
    elif command in ("ladder", "long", "mteb") and not words:
        {"ladder": ladder, "long": long, "mteb": benchmark}[command](options)
    else:
        raise InputError(
            f"{' '.join([command, *words])}: give search, long, plot, sts FILE, retrieval FOLDER, "
            "mteb, or nothing"
        )


if __name__ == "__main__":
    run(main)
