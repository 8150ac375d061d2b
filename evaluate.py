"""How good is it? Retrieval, masked tokens, long texts; and a search, to try it by hand.

    python evaluate.py                        # the ladder: BM25, random weights, each stage's model
    python evaluate.py search "how do I read a csv file"     # the ten best; no query: a prompt
    python evaluate.py long                   # beyond the trained length, four ways to scale RoPE
    python evaluate.py plot                   # learning curves, ladder, length curves as PNG
    python evaluate.py retrieval FOLDER       # a task of your own in the BEIR layout, beside BM25

All but the ladder take any checkpoint: --model=DIR, or a name on the hub. The ladder and the long
texts use modules that were held out from all training. Results go to OUT/results.json.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from common.checkpoint import find_checkpoint
from common.device import best_device
from common.files import fingerprint, read_json, read_json_lines, write_json, write_whole
from common.options import InputError, cli, read_options, split_words
from data.store import Sequences, Source
from data.tasks import PREFIXES, read_task, splits_of
from mlm import held_out_scores
from model import NomicBert, NomicBertForMaskedLM

STAGES = "mlm", "contrastive", "finetune"


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    out: str = "out"  # where the stages' runs are; results.json and pictures go there too
    model: str = ""  # a checkpoint directory or a name on the hub; empty: the last stage trained
    split: str = "test"  # held-out texts of the ladder: test, or dev while tuning
    max_tokens: int = 0  # texts are truncated to this, at least 3; 0: the trained length [0, 1e6]
    dims: int = 0  # retrieval: the first dimensions only (Matryoshka); 0: all [0, 1e6]
    rope_factor: float = 0.0  # search, retrieval: Dynamic NTK's s, from 1; 0: as saved [0, 1000]
    model_only: bool = False  # search: without BM25
    seed: int = 0  # of the random weights [0, 1e18]


# ------------------------------------------------------------------------------------------------
# Metrics. ranking: numbers of documents, best first; relevant: number of a document -> its grade


def recall(ranking, relevant, k=10):
    """The share of the relevant documents that are among the first k."""
    return sum(document in relevant for document in ranking[:k]) / len(relevant)


def mrr(ranking, relevant, k=10):
    """Reciprocal rank: 1 / rank of the first relevant document, 0 if none is among the first k."""
    ranks = [i + 1 for i, document in enumerate(ranking[:k]) if document in relevant]
    return 1 / ranks[0] if ranks else 0.0


def ndcg(ranking, relevant, k=10):
    """Normalised discounted cumulative gain: sum of grade / log2(1 + rank), over the largest sum
    that any ranking could have."""
    gain = [relevant.get(document, 0) for document in ranking[:k]]
    best = sorted(relevant.values(), reverse=True)[:k]

    def discounted(grades):
        return sum(grade / math.log2(2 + i) for i, grade in enumerate(grades))

    return discounted(gain) / discounted(best)


METRICS = {
    "nDCG@10": ndcg,
    "MRR@10": mrr,
    "recall@10": recall,
    "recall@100": functools.partial(recall, k=100),
}


def summary(values):
    """Mean and standard error; of a single value there is no error: None."""
    values, n = np.asarray(values, float), len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(values.mean()), "error": error}


def shown(score):
    """0.412 ±0.013, from a summary."""
    error = "" if score["error"] is None else f" ±{score['error']:.3f}"
    return f"{score['mean']:.3f}{error}"


# ------------------------------------------------------------------------------------------------
# Retrieval: each query ranks all documents by cosine


def top_k(query, document, k, block=(4096, 8192), device="cpu"):
    """The k largest inner products of each query, exactly.

    query (n, E), document (m, E) -> scores and numbers of documents, both (n, min(k, m)), best
    first. Scores are computed for one block of queries and documents at a time, so that memory does
    not grow with n * m."""
    k, found = min(k, len(document)), []
    for i in range(0, len(query), block[0]):
        q = torch.as_tensor(query[i : i + block[0]]).to(device)  # (b, E)
        scores, numbers = [], []  # of the best in each block of documents
        for j in range(0, len(document), block[1]):
            d = torch.as_tensor(document[j : j + block[1]]).to(device)
            best = (q @ d.T).topk(min(k, len(d)))
            scores.append(best.values)
            numbers.append(best.indices + j)
        best = torch.cat(scores, 1).topk(k)
        numbers = torch.cat(numbers, 1).gather(1, best.indices)
        found.append((best.values.cpu(), numbers.cpu()))
    return tuple(torch.cat(parts).numpy() for parts in zip(*found, strict=True))


def bm25(documents, split_identifiers=False, k=100):
    """BM25 over documents, word matching that needs no training and is hard to beat, so that no
    table goes without it (bm25s with its defaults).

    Returns a function: queries -> numbers of documents (n, k), best first, -1 where no more of them
    share a word with the query. split_identifiers: read_csv is also `read` and `csv`, as our
    tokenizer reads it; the stronger baseline on code."""
    # where jax is installed, bm25s would have it reserve most of a GPU's memory
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s

    def words(texts):
        texts = [text.replace("_", " ") if split_identifiers else text for text in texts]
        return bm25s.tokenize(texts, show_progress=False)

    index, known, k = bm25s.BM25(), words(documents), min(k, len(documents))
    index.index(known, show_progress=False)

    def rank(queries):
        quiet = {"show_progress": False, "backend_selection": "numpy"}
        found = index.retrieve(words(queries), k=k, **quiet)
        return np.where(found.scores > 0, found.documents, -1)

    return rank


def fuse(rankings, k=100):
    """Reciprocal rank fusion (Cormack et al., 2009): a document scores 1 / (60 + rank) in each
    ranking that has it. rankings: several (n, k) -> one (n, k), best first, -1 where there are no
    more. Ranks need no common scale, and cosines and BM25's scores have none."""
    fused = np.full((len(rankings[0]), k), -1)
    for i, lists in enumerate(zip(*rankings, strict=True)):
        scores = collections.Counter()
        for ranking in lists:
            scores.update({int(d): 1 / (61 + rank) for rank, d in enumerate(ranking) if d >= 0})
        best = [document for document, _ in scores.most_common(k)]
        fused[i, : len(best)] = best
    return fused


class Retrieval:
    """One split of a task in the BEIR layout (data/tasks.py)."""

    def __init__(self, folder, split, pool=None, queries=None):
        """pool, queries: for a quick look, so many documents (with all relevant ones) and queries.

        Raises InputError where the folder is not a task, naming file and line."""
        self.name = Path(folder).name
        documents, asked, judged, self.prefixes = read_task(folder, split)
        judged, names = dict(list(judged.items())[:queries]), list(documents)
        if pool and pool < len(names):
            right = {document for relevant in judged.values() for document in relevant}
            others = np.array([name for name in names if name not in right])
            drawn = np.random.default_rng(0).permutation(others)[: max(0, pool - len(right))]
            names = sorted([*right, *drawn.tolist()])
        number = {name: i for i, name in enumerate(names)}
        self.documents = [documents[name] for name in names]
        self.queries = [asked[query] for query in judged]
        self.relevant = [
            {number[document]: grade for document, grade in relevant.items()}
            for relevant in judged.values()
        ]
        sizes = f"{len(self.queries):,} queries, {len(self.documents):,} documents"
        self.about = f"{self.name}, {split}: {sizes}"

    @classmethod
    def open_all(cls, data, split, **sample):
        """The retrieval tasks of a data folder, in the order of their names."""
        folders = sorted(path for path in Path(data, "retrieval").glob("*") if path.is_dir())
        if not folders:
            raise InputError(f"no retrieval tasks in {data}: python data/pydocs.py makes some")
        return [cls(folder, split, **sample) for folder in folders]

    def rank(self, model, max_tokens, k=100, dims=None):
        """Each query's k best documents (n, k), best first."""
        query, document = (
            model.encode([self.prefixes[side] + text for text in texts], max_tokens, dims)
            for side, texts in (("query", self.queries), ("document", self.documents))
        )
        return top_k(query, document, k)[1]

    def rank_bm25(self, split_identifiers=False):
        """The same by BM25: (n, k), best first, -1 where nothing more was found."""
        return bm25(self.documents, split_identifiers)(self.queries)

    def scores(self, rankings):
        """metric -> its value for each query."""
        judged = list(zip(rankings, self.relevant, strict=True))
        return {name: [metric(*pair) for pair in judged] for name, metric in METRICS.items()}


def dev_scores(model, tasks, max_tokens, number):
    """nDCG@10 of each task and their mean, for the log; and a sample to read: a query of the last
    task (another one for each `number`) and the three documents that it finds first."""
    scores = {}
    for task in tasks:
        rankings = task.rank(model, max_tokens)
        scores[f"dev_{task.name}"] = float(np.mean(task.scores(rankings)["nDCG@10"]))
    place = number % len(task.queries)
    found = [
        ("-> " if i in task.relevant[place] else "   ") + " ".join(task.documents[i].split())[:90]
        for i in rankings[place, :3]
    ]
    sample = "\n    ".join([f"{task.queries[place]} (-> marks the right one)", *found])
    return {"dev_ndcg": float(np.mean(list(scores.values()))), **scores}, sample


# ------------------------------------------------------------------------------------------------
# The models and the results of a folder OUT


def trained_stages(out):
    """The stages that OUT has models of."""
    return [stage for stage in STAGES if Path(out, stage, "model.safetensors").is_file()]


def last_stage(out):
    """The directory of the last stage that was trained."""
    if not trained_stages(out):
        raise InputError(f"nothing was trained in {out}: python mlm.py, make demo, or --model=DIR")
    return Path(out, trained_stages(out)[-1])


def chosen_model(options):
    """(model, its directory, the length that texts are truncated to)."""
    directory = find_checkpoint(options.model) if options.model else last_stage(options.out)
    factor = options.rope_factor or None
    model = NomicBert.from_pretrained(directory, rope_factor=factor, device=best_device())
    return model, directory, options.max_tokens or model.config.trained_length


def models_of(options):
    """(name of the row, model) of word vectors alone, where OUT has them; of random weights; and of
    each stage that was trained."""
    last_stage(options.out)  # raises InputError where nothing was trained
    if Path(options.out, "words", "model.safetensors").is_file():
        words = NomicBert.from_pretrained(f"{options.out}/words", device=best_device())
        yield "word vectors alone", words
    for number, stage in enumerate(STAGES, start=1):
        if stage in trained_stages(options.out):
            model = NomicBert.from_pretrained(f"{options.out}/{stage}", device=best_device())
            if stage == trained_stages(options.out)[0]:
                torch.manual_seed(options.seed)
                untrained = NomicBert(model.config).to(model.device)
                untrained.tokenizer, untrained.dtype = model.tokenizer, model.dtype
                yield "random weights", untrained
            yield f"after stage {number}", model


def save_results(out, key, value):
    """Sets one entry of OUT/results.json and keeps the others."""
    path = Path(out, "results.json")
    results = read_json(path) if path.is_file() else {}
    write_json(path, {**results, key: value})


# ------------------------------------------------------------------------------------------------
# The ladder


def ladder(options):
    """BM25, random weights, the model after each stage, and the last one together with BM25, on the
    same held-out queries."""
    tasks, rows = Retrieval.open_all(options.data, options.split), {}
    print(*(task.about for task in tasks), sep="\n", end="\n\n")
    print(f"{'':28}" + "".join(f"{task.name + ', nDCG@10':>32}{'MRR@10':>10}" for task in tasks))

    def add_row(name, rankings):
        """Prints a row and keeps it: name -> task -> metric -> mean and standard error."""
        rows[name], line = {}, f"{name:28}"
        for task, ranking in zip(tasks, rankings, strict=True):
            row = {metric: summary(values) for metric, values in task.scores(ranking).items()}
            line += f"{shown(row['nDCG@10']):>32}{row['MRR@10']['mean']:10.3f}"
            rows[name][task.name] = row
        print(line, flush=True)

    for name, split_identifiers in (("BM25", False), ("BM25, identifiers split", True)):
        matched = [task.rank_bm25(split_identifiers) for task in tasks]
        add_row(name, matched)
    for name, model in models_of(options):
        length = options.max_tokens or model.config.trained_length
        rankings = [task.rank(model, length) for task in tasks]
        add_row(name, rankings)
    add_row("the last stage with BM25", list(map(fuse, zip(matched, rankings, strict=True))))
    save_results(options.out, "ladder", rows)
    if "mlm" in trained_stages(options.out):
        masked = NomicBertForMaskedLM.from_pretrained(f"{options.out}/mlm", device=best_device())
        folder = f"{options.data}/stage1/{options.split}"
        texts = Sequences(folder, masked.bert.tokenizer, masked.config.trained_length)
        loss, hit = held_out_scores(masked, [texts[i] for i in range(len(texts))])
        accuracy = f"{shown(summary(hit))} predicted, loss {loss.mean():.3f}"
        print(f"\nafter stage 1: {len(loss):,} masked tokens of {options.split} text, {accuracy}")


# ------------------------------------------------------------------------------------------------
# Beyond the trained length


def scalings(times):
    """Ways to read a text of `times` the trained length. Linear and NTK must be told how long it
    is; Dynamic NTK sees it from the text."""
    return {
        "plain RoPE": {"scaling": "none"},
        "linear": {"scaling": "linear", "factor": float(times)},
        "NTK": {"scaling": "ntk", "factor": float(times)},
        "Dynamic NTK": {"scaling": "dynamic", "factor": 2.0},
    }


def long(options, times=(1, 2, 4, 8, 16), windows=60):
    """Masked accuracy after stage 1 (or of --model, with an MLM head) at 1, 2, ... 16 times the
    trained length, or as far as --max-tokens: the same masks in the same text, which is read in
    pieces of each length."""
    model = NomicBertForMaskedLM.from_pretrained(
        options.model or f"{options.out}/mlm", device=best_device()
    )
    length, texts, table = model.config.trained_length, [], {}
    times = [n for n in times if n * length <= (options.max_tokens or math.inf)]
    if not times:
        raise InputError(f"--max-tokens={options.max_tokens}: give {length}, as trained, or more")
    longest = length * times[-1]
    column = Source(f"{options.data}/stage1/long", model.bert.tokenizer).columns["document"]
    for ids in (column[row] for row in range(len(column))):
        whole = ids[: len(ids) // longest * longest].astype(np.int64)
        texts += list(whole.reshape(-1, longest))
    if not texts:
        raise InputError(f"{options.data} has no long text of {longest} tokens: lower --max-tokens")
    print(f"{len(texts[:windows])} windows of {longest} held-out tokens")
    print(f"\n{'':14}{'tokens':>8}{'masked accuracy':>20}")
    for name in scalings(1):
        for n in times:
            model.bert.rope = dataclasses.replace(model.bert.rope, **scalings(n)[name])
            accuracy = summary(held_out_scores(model, texts[:windows], piece=n * length)[1])
            table.setdefault(name, {})[n * length] = accuracy
            print(f"{name:14}{n * length:8}{shown(accuracy):>20}", flush=True)
    if not options.model:
        save_results(options.out, "long", {"trained length": length, "table": table})


# ------------------------------------------------------------------------------------------------
# A task of your own


def retrieval(options, folder):
    """The metrics on each split of a task in the BEIR layout, beside BM25."""
    if not splits_of(folder):
        raise InputError(f"{folder} has no qrels/*.tsv: the layout of a task is in data/tasks.py")
    model, directory, length = chosen_model(options)
    for split in splits_of(folder):
        task = Retrieval(folder, split)
        print(task.about)
        print(f"{'':20}" + "".join(f"{metric:>17}" for metric in METRICS))
        own = task.rank(model, length, dims=options.dims or None)
        for name, ranking in {"BM25": task.rank_bm25(), str(directory): own}.items():
            row = {metric: summary(values) for metric, values in task.scores(ranking).items()}
            print(f"{name[-19:]:20}" + "".join(f"{shown(score):>17}" for score in row.values()))
            save_results(options.out, f"retrieval {folder} {split} {name}", row)


# ------------------------------------------------------------------------------------------------
# Search


def document_embeddings(model, directory, corpus, texts, max_tokens):
    """Embeddings (n, E) of the texts of the file `corpus`, kept beside the checkpoint, because to
    embed them takes minutes. A query then is one text through the model and one matrix product."""
    files = (directory / "model.safetensors", corpus)
    key = " ".join([str(max_tokens), str(model.rope), *map(fingerprint, files)])
    cache = directory / "nanoembed-search.safetensors"
    # a missing or damaged cache is made again
    with contextlib.suppress(Exception), safe_open(cache, "np") as kept:
        if kept.metadata()["key"] == key:
            return kept.get_tensor("embeddings").astype(np.float32)
    print(f"embedding {len(texts):,} documents, once for this checkpoint", file=sys.stderr)
    embeddings = model.encode([PREFIXES["document"] + text for text in texts], max_tokens)
    with contextlib.suppress(InputError):  # a read-only checkpoint is searched without a cache
        stored = {"embeddings": embeddings.astype(np.float16)}
        write_whole(cache, lambda path: save_file(stored, path, {"key": key}))
    return embeddings


def search(options, query=None):
    """Prints the ten best documents with their cosines; without a query, asks for queries until an
    empty line."""
    if query is not None and not query.strip():
        raise InputError('the query is empty: python evaluate.py search "how do I read a csv file"')
    model, directory, length = chosen_model(options)
    corpus = Path(options.data, "search", "corpus.jsonl")
    rows = [row for _, row in read_json_lines(corpus)]
    texts = [row["text"] for row in rows]
    embeddings = document_embeddings(model, directory, corpus, texts, length)
    match = None if options.model_only else bm25(texts, split_identifiers=True)
    if match:
        print("by the model and BM25 together; --model-only: without BM25", file=sys.stderr)
    for asked in typed_queries() if query is None else [query]:
        query_embedding = model.encode([PREFIXES["query"] + asked])  # (1, E)
        numbers = top_k(query_embedding, embeddings, k=100)[1]
        numbers = fuse([numbers, match([asked])]) if match else numbers
        for number in numbers[0][numbers[0] >= 0][:10]:  # -1: no more were found
            name, cosine = rows[number]["_id"], float(embeddings[number] @ query_embedding[0])
            text = " ".join(texts[number].removeprefix(name).split())
            print(f"{cosine:.3f}  {name}\n       {text[:90]}")


def typed_queries():
    """What a person types, until an empty line or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input("search> ").strip():
            yield query


# ------------------------------------------------------------------------------------------------


def plot(options):
    """Pictures of what is in OUT, as PNG."""
    from common.plots import plot_all

    print("\n".join(f"wrote {path}" for path in plot_all(options.out)))


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    command, *words = words or ["ladder"]
    commands = {"ladder": ladder, "long": long, "plot": plot}
    if command == "search":
        search(options, " ".join(words) if words else None)
    elif command == "retrieval" and len(words) == 1:
        retrieval(options, words[0])
    elif command in commands and not words:
        commands[command](options)
    else:
        raise InputError(f"{command}: give search, long, plot, retrieval FOLDER, or nothing")


if __name__ == "__main__":
    cli(main)
