"""Metrics: how good is a ranking, and how sure are we?

A query ranks all documents by the cosine of their embeddings with its own. What counts is how near
to the top the relevant ones are: nDCG@10, the metric of BEIR and MTEB, looks at the first ten,
MRR@10 at the first relevant one, recall@100 at whether they are there at all. Every mean has its
standard error, over the unit that was drawn: queries, or texts whose tokens were masked.

Stages 2 and 3 score held-out pairs with this file while they train; evaluate.py has the commands.
"""

import functools
import math
import os
from pathlib import Path

import numpy as np
import torch

from common.options import InputError
from data.tasks import read_task

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
            makes = "data/pydocs.py makes some; to train without, give --eval-every=0"
            raise InputError(f"no retrieval tasks in {data}: {makes}")
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
