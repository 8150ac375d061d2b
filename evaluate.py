"""How good is it? Retrieval, masked tokens, long texts; and a search, to try it by hand.

    python evaluate.py                        # the ladder: BM25, random weights, each stage's model
    python evaluate.py search "how do I read a csv file"     # the ten best; no query: a prompt
    python evaluate.py long                   # beyond the trained length, four ways to scale RoPE
    python evaluate.py plot                   # learning curves, ladder, length curves as PNG
    python evaluate.py retrieval FOLDER       # a task of your own in the BEIR layout, beside BM25

All but the ladder take any checkpoint: --model=DIR, or a name on the hub. The ladder and the long
texts use modules that were held out from all training. Results go to OUT/results.json.

A model reads the first --max-tokens tokens of a text, in a search, too; BM25 reads all of it.
"""

import collections
import contextlib
import functools
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from common.checkpoint import find_checkpoint
from common.device import best_device
from common.files import fingerprint, read_json, write_json, write_whole
from common.options import InputError, cli, read_options, split_words
from data.store import Sequences, Source
from data.tasks import PREFIXES, read_rows, read_task, splits_of
from model import NomicBert, NomicBertForMaskedLM

# a run's folder in OUT -> its row in the ladder
MODELS = {"words": "word vectors alone", "mlm": "after stage 1"}
MODELS |= {"contrastive": "after stage 2", "finetune": "after stage 3"}


@dataclass
class Options:
    data: str = "out/pydocs"  # ladder, search, long: a data folder
    out: str = "out"  # where the stages' runs are; results.json and pictures go there too
    model: str = ""  # not ladder: a checkpoint or a name on the hub; empty: the last stage trained
    split: str = "test"  # ladder: the held-out texts, test, or dev while tuning
    max_tokens: int = 0  # texts are truncated to this, at least 3; 0: the trained length [0, 1e6]
    dims: int = 0  # retrieval: the first dimensions only (Matryoshka); 0: all [0, 1e6]
    rope_factor: float = 0.0  # search, retrieval: Dynamic NTK's s, from 1; 0: as saved [0, 1000]
    documents: int = 0  # search: only so many documents, drawn at random; 0: all [0, 1e9]
    model_only: bool = False  # search: without BM25


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


METRICS = {"nDCG@10": ndcg, "MRR@10": mrr, "recall@10": recall}
METRICS["recall@100"] = functools.partial(recall, k=100)


def summary(values, unit=None):
    """Mean and standard error. Of a single value, or a single unit, there is no error: None.

    unit: for values that were not drawn one by one, such as the tokens of a text, the number of the
    text that each is from. Values of one unit depend on each other, so deviations from the mean are
    summed within a unit before they are squared (the cluster-robust standard error)."""
    values = np.asarray(values, float)
    units = np.arange(len(values)) if unit is None else np.unique(unit, return_inverse=True)[1]
    deviation = np.bincount(units, values - values.mean())  # of each unit
    n, squares = len(deviation), (deviation**2).sum()
    error = math.sqrt(squares * n / (n - 1)) / len(values) if n > 1 else None
    return {"mean": float(values.mean()), "error": error}


def shown(score):
    """0.412 ±0.013, from a summary."""
    error = "" if score["error"] is None else f" ±{score['error']:.3f}"
    return f"{score['mean']:.3f}{error}"


# ------------------------------------------------------------------------------------------------
# Retrieval: each query ranks all documents by cosine


def top_k(query, document, k, block=1 << 26, device="cpu"):
    """The k largest inner products of each query, exactly.

    query (n, E), document (m, E) -> scores and numbers of documents, both (n, min(k, m)), best
    first. At most `block` scores are in memory at a time, for some of the queries."""
    document, k = torch.as_tensor(document).to(device), min(k, len(document))
    rows = max(1, block // max(1, len(document)))
    best = [(q.to(device) @ document.T).topk(k) for q in torch.as_tensor(query).split(rows)]
    return tuple(torch.cat(blocks).cpu().numpy() for blocks in zip(*best, strict=True))


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

    index, tokens, k = bm25s.BM25(), words(documents), min(k, len(documents))
    if not tokens.vocab:  # stop words, marks and single letters only: bm25s cannot index them
        return lambda queries: np.full((len(queries), k), -1)
    index.index(tokens, show_progress=False)

    def rank(queries):
        quiet = {"show_progress": False, "backend_selection": "numpy"}
        best = index.retrieve(words(queries), k=k, **quiet)
        return np.where(best.scores > 0, best.documents, -1)

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
        documents, query_texts, judged, self.prefixes = read_task(folder, split)
        judged, names = dict(list(judged.items())[:queries]), list(documents)
        if pool and pool < len(names):
            right = {document for relevant in judged.values() for document in relevant}
            others = np.array([name for name in names if name not in right])
            drawn = np.random.default_rng(0).permutation(others)[: max(0, pool - len(right))]
            names = sorted([*right, *drawn.tolist()])
        number = {name: i for i, name in enumerate(names)}
        self.documents = [documents[name] for name in names]
        self.queries = [query_texts[query] for query in judged]
        self.relevant = [
            {number[document]: grade for document, grade in relevant.items()}
            for relevant in judged.values()
        ]
        # the document that is the query itself, under the same id (ArguAna, Quora); -1: none
        own = [-1 if query in judged[query] else number.get(query, -1) for query in judged]
        self.own = np.array(own)[:, None]  # (n, 1)
        self.about = f"{self.name}, {split}: {len(judged):,} queries, {len(names):,} documents"

    @classmethod
    def open_all(cls, data, split, **sample):
        """The retrieval tasks of a data folder, in the order of their names."""
        folders = sorted(path for path in Path(data, "retrieval").glob("*") if path.is_dir())
        if not folders:
            raise InputError(f"no retrieval tasks in {data}: python data/pydocs.py makes some")
        return [cls(folder, split, **sample) for folder in folders]

    def rank(self, model, max_tokens, k=100, dims=None):
        """Each query's k best documents (n, k), best first, -1 where there are no more."""
        query, document = (
            model.encode([self.prefixes[side] + text for text in texts], max_tokens, dims)
            for side, texts in (("query", self.queries), ("document", self.documents))
        )
        return self.without_own(top_k(query, document, k + 1)[1], k)

    def rank_bm25(self, split_identifiers=False, k=100):
        """The same by BM25."""
        return self.without_own(bm25(self.documents, split_identifiers, k + 1)(self.queries), k)

    def without_own(self, rankings, k):
        """Rankings without the query itself, as beir and mteb score them: (n, k + 1) -> (n, k)."""
        order = np.argsort(rankings == self.own, axis=1, kind="stable")  # the query itself is last
        return np.take_along_axis(np.where(rankings == self.own, -1, rankings), order, 1)[:, :k]

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
    nearest = [
        ("-> " if i in task.relevant[place] else "   ") + " ".join(task.documents[i].split())[:90]
        for i in rankings[place, :3]
    ]
    sample = "\n    ".join([f"{task.queries[place]} (-> marks the right one)", *nearest])
    return {"dev_ndcg": float(np.mean(list(scores.values()))), **scores}, sample


# ------------------------------------------------------------------------------------------------
# Models and results of a folder OUT


def trained_stages(out):
    """The runs of MODELS that OUT has models of."""
    return [stage for stage in MODELS if Path(out, stage, "model.safetensors").is_file()]


def last_stage(out):
    """The directory of the last stage that was trained."""
    if not trained_stages(out):
        raise InputError(f"nothing was trained in {out}: run make demo, or give another --out")
    return Path(out, trained_stages(out)[-1])


def chosen_model(options):
    """(model, its directory, the length that texts are truncated to)."""
    directory = find_checkpoint(options.model) if options.model else last_stage(options.out)
    factor = options.rope_factor or None
    model = NomicBert.from_pretrained(directory, rope_factor=factor, device=best_device())
    return model, directory, options.max_tokens or model.config.trained_length


def models_of(options):
    """(name of the row, model) of random weights in the shape of the last model in OUT, and of each
    run of MODELS that is there."""
    last = NomicBert.from_pretrained(last_stage(options.out), device=best_device())
    torch.manual_seed(0)
    untrained = NomicBert(last.config).to(last.device)
    untrained.tokenizer, untrained.dtype = last.tokenizer, last.dtype
    yield "random weights", untrained
    for stage in trained_stages(options.out):
        yield MODELS[stage], NomicBert.from_pretrained(f"{options.out}/{stage}", device=last.device)


def save_results(out, key, value):
    """Sets one entry of OUT/results.json and keeps the others."""
    path = Path(out, "results.json")
    results = read_json(path) if path.is_file() else {}
    write_json(path, {**results, key: value})


# ------------------------------------------------------------------------------------------------
# The commands


def compare(task, models, options):
    """Prints the metrics of BM25, of each (name, model), and of the last model together with BM25,
    as a search uses it. Returns name -> metric -> mean and standard error."""
    print(f"{task.about}\n{'':28}" + "".join(f"{metric:>17}" for metric in METRICS))

    def print_row(name, scores):
        row = {metric: summary(values) for metric, values in scores.items()}
        print(f"{name[-27:]:28}" + "".join(f"{shown(s):>17}" for s in row.values()), flush=True)
        return row

    rows = {"BM25": print_row("BM25", task.scores(task.rank_bm25()))}
    matched = task.rank_bm25(split_identifiers=True)
    alone, split = task.scores(matched), "BM25, identifiers split"
    rows[split] = print_row(split, alone)
    for name, model in models:
        length = options.max_tokens or model.config.trained_length
        ranking = task.rank(model, length, dims=options.dims or None)
        rows[name] = print_row(name, task.scores(ranking))
    together, name = task.scores(fuse([matched, ranking])), f"{name} + BM25"
    rows[name] = print_row(name, together)
    print_row(
        "  minus BM25 split, paired", {m: np.subtract(together[m], alone[m]) for m in METRICS}
    )
    print()
    return rows


def ladder(options):
    """BM25, random weights and the model after each stage on the same held-out queries."""
    from mlm import held_out_scores

    tasks = Retrieval.open_all(options.data, options.split)
    rows = {task.name: compare(task, models_of(options), options) for task in tasks}
    save_results(options.out, "ladder", rows)
    if "mlm" in trained_stages(options.out):
        model = NomicBertForMaskedLM.from_pretrained(f"{options.out}/mlm", device=best_device())
        folder, length = f"{options.data}/stage1/{options.split}", model.config.trained_length
        texts = Sequences(folder, model.bert.tokenizer, length)
        loss, hit, window = held_out_scores(model, [texts[i] for i in range(len(texts))])
        accuracy = f"{shown(summary(hit, window))} predicted, loss {loss.mean():.3f}"
        print(f"after stage 1: {len(loss):,} masked tokens of {options.split} text, {accuracy}")


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
    from mlm import held_out_scores

    where = options.model or f"{options.out}/mlm"
    model = NomicBertForMaskedLM.from_pretrained(where, device=best_device())
    length, texts, table = model.config.trained_length, [], {}
    times = [n for n in times if n * length <= (options.max_tokens or math.inf)]
    if not times:
        raise InputError(f"--max-tokens={options.max_tokens}: give {length}, as trained, or more")
    longest = length * times[-1]
    column = Source(f"{options.data}/stage1/long", model.bert.tokenizer).columns["document"]
    for ids in (column[row].astype(np.int64) for row in range(len(column))):
        texts += list(ids[: len(ids) // longest * longest].reshape(-1, longest))
    if not texts:
        raise InputError(f"{options.data} has no long text of {longest} tokens: lower --max-tokens")
    print(f"{len(texts[:windows])} windows of {longest} held-out tokens")
    print(f"\n{'':14}{'tokens':>8}{'masked accuracy':>20}")
    for name in scalings(1):
        for n in times:
            model.bert.rope = replace(model.bert.rope, **scalings(n)[name])
            _, hit, window = held_out_scores(model, texts[:windows], piece=n * length)
            accuracy = summary(hit, window)
            table.setdefault(name, {})[n * length] = accuracy
            print(f"{name:14}{n * length:8}{shown(accuracy):>20}", flush=True)
    if not options.model:
        save_results(options.out, "long", {"trained length": length, "table": table})


def retrieval(options, folder):
    """The metrics on each split of a task in the BEIR layout, beside BM25."""
    if not splits_of(folder):
        raise InputError(f"{folder} has no qrels/*.tsv: the layout of a task is in data/tasks.py")
    model, directory, length = chosen_model(options)
    name = options.model or str(directory)
    settings = f"--max-tokens={length} --dims={options.dims} --rope-factor={options.rope_factor:g}"
    for split in splits_of(folder):
        rows = compare(Retrieval(folder, split), [(name, model)], options)
        save_results(options.out, f"retrieval {folder} {split} {name} {settings}", rows)


def document_embeddings(model, directory, corpus, texts, max_tokens):
    """Embeddings (n, E) of texts of the file `corpus`, kept beside the checkpoint, because to embed
    them takes minutes. A query then is one text through the model and one matrix product."""
    files = (directory / "model.safetensors", corpus)
    key = " ".join([str(max_tokens), str(model.rope), str(len(texts)), *map(fingerprint, files)])
    cache = directory / "nanoembed-search.safetensors"
    # a missing or damaged cache is made again
    with contextlib.suppress(Exception), safe_open(cache, "np") as kept:
        if kept.metadata()["key"] == key:
            return kept.get_tensor("embeddings").astype(np.float32)
    of_each = f"the first {max_tokens:,} tokens of each"
    print(f"embedding {len(texts):,} documents ({of_each}), once for this model", file=sys.stderr)
    embeddings = model.encode([PREFIXES["document"] + text for text in texts], max_tokens)
    with contextlib.suppress(InputError):  # a read-only checkpoint is searched without a cache
        stored = {"embeddings": embeddings.astype(np.float16)}
        write_whole(cache, lambda path: save_file(stored, path, {"key": key}))
    return embeddings


def search(options, *words):
    """Prints the ten best documents, and for each where the model and BM25 rank it among their
    first hundred; without a query, asks for queries until an empty line."""
    if words and not " ".join(words).strip():
        raise InputError('the query is empty: python evaluate.py search "how do I read a csv file"')
    model, directory, length = chosen_model(options)
    corpus = Path(options.data, "search", "corpus.jsonl")
    documents = [(name, text) for _, name, text in read_rows(corpus)]
    drawn = np.random.default_rng(0).permutation(len(documents))[: options.documents or None]
    names, texts = zip(*(documents[i] for i in drawn), strict=True)
    embeddings = document_embeddings(model, directory, corpus, texts, length)
    match = None if options.model_only else bm25(texts, split_identifiers=True)
    typed = iter(lambda: input("search> ").strip(), "")
    with contextlib.suppress(EOFError):
        for query in [" ".join(words)] if words else typed:
            embedding = model.encode([PREFIXES["query"] + query])  # (1, E)
            rankings = {"model": top_k(embedding, embeddings, k=100)[1]}
            rankings |= {"BM25": match([query])} if match else {}
            ranks = [{number: i for i, number in enumerate(x[0], 1)} for x in rankings.values()]
            print("".join(f"{name:>6}" for name in rankings), " cosine")
            best = fuse([*rankings.values()])[0]
            for number in best[best >= 0][:10]:  # -1: no more were found
                places = "".join(f"{rank.get(number, '-'):>6}" for rank in ranks)
                text = " ".join(texts[number].removeprefix(names[number]).split())
                cosine = embeddings[number] @ embedding[0]
                print(f"{places}  {cosine:6.3f}  {names[number]}\n{'':8}{text[:90]}")


def plot(options):
    """Pictures of what is in OUT, as PNG."""
    from common.plots import plot_all

    print("\n".join(f"wrote {path}" for path in plot_all(options.out)))


COMMANDS = {  # name -> function, and the options that it uses
    "ladder": (ladder, "data out split max_tokens"),
    "search": (search, "data out model max_tokens rope_factor documents model_only"),
    "long": (long, "data out model max_tokens"),
    "plot": (plot, "out"),
    "retrieval": (retrieval, "out model max_tokens dims rope_factor"),
}


def main(arguments):
    words, arguments = split_words(arguments)
    options, origin = read_options(Options, arguments)
    name, *words = words or ["ladder"]
    complete = {"search": True, "retrieval": len(words) == 1}.get(name, not words)
    if name not in COMMANDS or not complete:
        raise InputError(f"{name}: give search, long, plot, retrieval FOLDER, or nothing")
    command, uses = COMMANDS[name]
    for key, where in origin.items():
        if where == "option" and key not in uses.split():
            listed = ", ".join(f"--{option.replace('_', '-')}" for option in uses.split())
            raise InputError(f"--{key}: {name} does not use it; its options are {listed}")
    command(options, *words)


if __name__ == "__main__":
    cli(main)
