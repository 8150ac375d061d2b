"""How good is it? Retrieval, masked words, long texts; and a search, to try it by hand.

    python evaluate.py                        # the ladder: BM25, random weights, each stage's model
    python evaluate.py search "how do I read a csv file"     # the ten best; no query: a prompt
    python evaluate.py long                   # beyond the trained length, four ways to scale RoPE
    python evaluate.py plot                   # learning curves, ladder, length curves as PNG

The metrics are in retrieval.py, masked accuracy is in mlm.py. Everything is measured on modules
that were held out from all training; results go to out/results.json.
"""

import contextlib
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
from data import store
from mlm import held_out_scores
from model import NomicBert, NomicBertForMaskedLM
from options import InputError, read_options, run
from retrieval import Retrieval, bm25_rank, summary, top_k

STAGES = ("mlm", "contrastive", "finetune")


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    out: str = "out"  # where the stages' runs are; results.json and pictures go there too
    model: str = ""  # search: a checkpoint directory; empty: the last stage that was trained
    split: str = "test"  # held-out modules to report on: test, or dev while tuning
    max_tokens: int = 128  # queries and documents are cut to this length
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
    for name, model in models_of(options):
        rows[name] = row_of(
            tasks, {task.name: task.rank(model, options.max_tokens) for task in tasks}
        )
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
    """(name of the row, model): random weights, and each stage that was trained."""
    trained = [stage for stage in STAGES if Path(options.out, stage, "model.safetensors").is_file()]
    if not trained:
        raise InputError(f"nothing was trained in {options.out}: python mlm.py, or make demo")
    for stage in trained:
        model = NomicBert.from_pretrained(Path(options.out, stage))
        if stage == trained[0]:
            torch.manual_seed(options.seed)
            untrained = NomicBert(model.config)
            untrained.tokenizer, untrained.dtype = model.tokenizer, model.dtype
            yield "random weights", untrained
        yield f"after {stage}", model


def masked_words(options):
    """Stage 1's model on held-out text: how many of the masked tokens it finds, and perplexity."""
    model = NomicBertForMaskedLM.from_pretrained(Path(options.out, "mlm"))
    folder = f"{options.data}/stage1/{options.split}"
    texts = store.Sequences(folder, model.bert.tokenizer, model.config.trained_length)
    loss, hit = held_out_scores(model, [texts[i] for i in range(len(texts))])
    return {"accuracy": summary(hit), "perplexity": math.exp(loss.mean()), "tokens": len(loss)}


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
    masked = NomicBertForMaskedLM.from_pretrained(Path(options.out, "mlm"))
    encoder = NomicBert.from_pretrained(last_stage(options.out))
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
# Search


def last_stage(out):
    """The directory of the last stage that was trained."""
    for stage in reversed(STAGES):
        if Path(out, stage, "model.safetensors").is_file():
            return Path(out, stage)
    raise InputError(f"nothing was trained in {out}: make demo, or --model=DIR")


class Index:
    """The embeddings of all documents of a data folder, kept beside the checkpoint they are of."""

    def __init__(self, directory, data, max_tokens):
        self.model = NomicBert.from_pretrained(directory)
        self.corpus, cache = Path(data, "search", "corpus.jsonl"), Path(directory, "search.npz")
        if not self.corpus.is_file():
            raise InputError(f"{self.corpus} is missing: python data/pydocs.py makes out/pydocs")
        made_of = (Path(directory, "model.safetensors"), self.corpus)
        key = f"{max_tokens} " + " ".join(map(store.fingerprint, made_of))
        kept = np.load(cache) if cache.is_file() else {"key": ""}
        if str(kept["key"]) != key:
            kept = self.build(key, max_tokens)
            common.replace(cache, lambda path: np.savez(open(path, "wb"), **kept))
        self.embeddings, self.offsets = kept["embeddings"].astype(np.float32), kept["offsets"]

    def build(self, key, max_tokens):
        lines = self.corpus.read_bytes().splitlines(keepends=True)
        print(f"embedding {len(lines):,} documents, once for this checkpoint", file=sys.stderr)
        texts = ["search_document: " + json.loads(line)["text"] for line in lines]
        embeddings = self.model.encode(texts, max_tokens).astype(np.float16)
        offsets = np.cumsum([0, *map(len, lines)])  # of the lines: a search reads only ten of them
        return {"key": key, "embeddings": embeddings, "offsets": offsets}

    def search(self, query, k=10):
        """(cosine, name, text) of the k best documents, best first."""
        if not query.strip():
            raise InputError(
                'the query is empty: python evaluate.py search "how do I read a csv file"'
            )
        query = self.model.encode(["search_query: " + query])
        scores, numbers = top_k(query, self.embeddings, k)
        with open(self.corpus, "rb") as file:
            for score, number in zip(scores[0], numbers[0], strict=True):
                file.seek(self.offsets[number])
                row = json.loads(file.readline())
                yield score, row["_id"], row["text"]


def typed_queries():
    """What a person types, until an empty line or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input("search> ").strip():
            yield query


def search(options, query):
    """Prints the ten best documents; without a query, asks for queries until an empty line."""
    index = Index(options.model or last_stage(options.out), options.data, options.max_tokens)
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
    elif command == "plot" and not words:
        from plots import plot_all

        print("\n".join(f"wrote {path}" for path in plot_all(options.out)))
    elif command in ("ladder", "long") and not words:
        {"ladder": ladder, "long": long}[command](options)
    else:
        raise InputError(f"{' '.join([command, *words])}: give search, long, plot or nothing")


if __name__ == "__main__":
    run(main)
