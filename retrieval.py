"""Retrieval: what it is to find a document, and how well it was found.

A task is queries, a pool of documents, and which documents answer which query. A model embeds both,
and each query ranks the pool by cosine. Three numbers, each from 0 to 1, say how early the right
document comes:

    recall@10   is it among the first ten?
    MRR@10      1 / rank, or 0 beyond ten
    nDCG@10     1 / log2(1 + rank), or 0 beyond ten; of several right ones, their sum over the best

A task on disk has the layout of BEIR (arXiv 2104.08663), each file plain or gzipped:

    corpus.jsonl     {"_id": "d1", "title": "may be missing", "text": "..."}
    queries.jsonl    {"_id": "q1", "text": "..."}
    qrels/test.tsv   query-id, corpus-id, score: tab-separated, below a header
    meta.json        {"prefixes": {"query": "search_query: ", "document": ...}}; may be missing

Lexical search (BM25) needs no training and is hard to beat, so no table goes without it.
"""

import functools
import gzip
import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from checkpoint import PREFIXES
from options import InputError

# ------------------------------------------------------------------------------------------------
# Metrics. ranking: numbers of documents, best first; relevant: number of a document -> its grade


def recall(ranking, relevant, k=10):
    """The share of the relevant documents that stand among the first k."""
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
    """Mean and standard error."""
    values = np.asarray(values, float)
    return {"mean": values.mean(), "error": values.std(ddof=1) / math.sqrt(len(values))}


# ------------------------------------------------------------------------------------------------
# Retrieval


def read_lines(path):
    """The numbered lines of a file, plain or with .gz behind its name.

    Raises InputError for a file that is missing, damaged or not UTF-8."""
    if not path.is_file() and path.with_name(path.name + ".gz").is_file():
        path = path.with_name(path.name + ".gz")
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        where = f" beyond line {number}" if number else ""
        raise InputError(f"{path} cannot be read{where}: {reason}") from None


def read_texts(path):
    """id -> text of a corpus.jsonl or queries.jsonl; a title comes before its text [code]."""
    texts = {}
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            texts[str(row["_id"])] = f"{row.get('title') or ''} {row['text']}".strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f'{path}, line {number}: not {{"_id": ..., "text": ...}}') from None
    return texts


def read_judgements(path, queries, documents):
    """query id -> document id -> grade above 0, of a qrels file.

    Raises InputError for a line of another form, or that names what is not there."""
    judged = {}
    for number, line in read_lines(path):
        parts = line.split("\t")
        if number == 1 and parts[-1] == "score":
            continue
        if len(parts) != 3 or not parts[2].lstrip("-").isdigit():
            raise InputError(f"{path}, line {number}: not query-id, corpus-id, score with tabs")
        query, document, grade = parts
        if query not in queries or document not in documents:
            name = "queries" if query not in queries else "corpus"
            missing = query if query not in queries else document
            raise InputError(f"{path}, line {number}: {missing} is not in {name}.jsonl")
        if int(grade) > 0:
            judged.setdefault(query, {})[document] = int(grade)
    if not judged:
        raise InputError(f"{path} judges no document relevant")
    return judged


class Retrieval:
    """One split of a task in the BEIR layout."""

    def __init__(self, folder, split, pool=None, queries=None):
        """pool, queries: for a quick look, so many documents (with all relevant ones) and queries.

        Raises InputError where the folder is not a task, naming file and line."""
        folder = Path(folder)
        self.name, meta = folder.name, folder / "meta.json"
        self.prefixes = PREFIXES
        if meta.is_file():
            try:
                self.prefixes = json.loads(meta.read_text())["prefixes"]
            except (ValueError, KeyError) as error:
                raise InputError(f"{meta} gives no prefixes: {error!r}") from None
        documents, asked = (read_texts(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
        judged = read_judgements(folder / "qrels" / f"{split}.tsv", asked, documents)
        judged = dict(list(judged.items())[:queries])

        names = list(documents)
        if pool and pool < len(names):
            right = {document for relevant in judged.values() for document in relevant}
            others = np.array([name for name in names if name not in right])
            drawn = np.random.default_rng(0).permutation(others)[: max(0, pool - len(right))]
            names = [*right.intersection(names), *drawn]
            names.sort()
        number = {name: i for i, name in enumerate(names)}
        self.documents = [documents[name] for name in names]
        self.queries = [asked[query] for query in judged]
        self.relevant = [
            {number[document]: grade for document, grade in relevant.items()}
            for relevant in judged.values()
        ]

    @classmethod
    def open_all(cls, data, split, **sample):
        """The retrieval tasks of a data folder, in the order of their names."""
        folders = sorted(Path(data, "retrieval").glob("*/"))
        if not folders:
            raise InputError(f"no retrieval tasks in {data}: python data/pydocs.py makes some")
        return [cls(folder, split, **sample) for folder in folders]

    def rank(self, model, max_tokens, k=100, dims=None):
        """Each query's k best documents (n, k); mean cosine of its right, and of a random one."""
        query, document = (
            model.encode([self.prefixes[side] + text for text in texts], max_tokens, dims)
            for side, texts in (("query", self.queries), ("document", self.documents))
        )
        right = [next(iter(relevant)) for relevant in self.relevant]
        random = np.random.default_rng(0).integers(len(document), size=len(query))
        cosines = [float((query * document[other]).sum(1).mean()) for other in (right, random)]
        return top_k(query, document, k)[1], cosines

    def scores(self, rankings):
        """metric -> its value for each query."""
        judged = list(zip(rankings, self.relevant, strict=True))
        return {name: [metric(*pair) for pair in judged] for name, metric in METRICS.items()}


def top_k(query, document, k, block=(4096, 8192), device="cpu"):
    """The k largest inner products of each query, exactly. Of equal ones, the document of the lower
    number comes first.

    query (n, E), document (m, E) -> scores (n, k) and numbers of documents (n, k), best first; of m
    documents, if m < k. Only `block` queries times documents are compared at a time, on `device`,
    and the best so far are kept: the memory for scores is the same for a thousand documents and for
    a billion, and the embeddings may be files (np.memmap)."""
    k, found = min(k, len(document)), []
    for i in range(0, len(query), block[0]):
        q = torch.from_numpy(np.array(query[i : i + block[0]])).to(device)  # (b, E)
        best = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=device)
        for j in range(0, len(document), block[1]):
            d = torch.from_numpy(np.array(document[j : j + block[1]])).to(device)
            scores = q @ d.T
            places = first_k(scores, k)
            # the earlier documents stand first in the merge, so that ties go to lower numbers
            merged = [
                torch.cat(pair, 1)
                for pair in zip(best, (scores.gather(1, places), places + j), strict=True)
            ]
            places = first_k(merged[0], k)
            best = [part.gather(1, places) for part in merged]
        found.append([part.cpu() for part in best])
    return tuple(torch.cat(parts).numpy() for parts in zip(*found, strict=True))


def first_k(scores, k):
    """Places of the k largest scores of each row (b, k), best first, ties by place: what a stable
    sort gives, at the price of torch.topk, which breaks ties as it likes."""
    k = min(k, scores.shape[1])
    values, places = scores.topk(min(k + 1, scores.shape[1]))
    if values.shape[1] > k:  # is the last one in equal to the first one out?
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        places = places[:, :k]
        if len(tied):
            places[tied] = scores[tied].sort(descending=True, stable=True).indices[:, :k]
    places = places.sort(1).values
    order = scores.gather(1, places).sort(descending=True, stable=True).indices
    return places.gather(1, order)


def distinct(keys):
    """Numbers for things that repeat, such as documents that several queries share.

    keys: bytes of each of n things -> first (m,), where each different one stands for the first
    time, in order; number (n,), which of these m each thing is. Kept are 8 bytes of a hash of each:
    of a million different things, two share theirs once in 37 million times."""
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") for key in keys],
        np.uint64,
    )
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[number]


def dev_scores(model, tasks, max_tokens):
    """For the log: nDCG@10 of each task and their mean. For a person: a query and what it finds."""
    scores = {}
    for task in tasks:
        rankings, _ = task.rank(model, max_tokens)
        scores[f"dev_{task.name}"] = float(np.mean(task.scores(rankings)["nDCG@10"]))
    found = [
        ("-> " if i in task.relevant[0] else "   ") + " ".join(task.documents[i].split())[:90]
        for i in rankings[0, :3]
    ]
    sample = "\n    ".join([f"{task.queries[0]} (-> marks the right one)", *found])
    return {"dev_ndcg": float(np.mean(list(scores.values()))), **scores}, sample


def bm25_index(documents):
    """BM25 by the bm25s library, with its defaults: (queries, k) -> numbers of documents (n, k)."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, show_progress=False), show_progress=False)

    def search(queries, k):
        words = bm25s.tokenize(queries, show_progress=False)
        return index.retrieve(words, k=min(k, len(documents)), show_progress=False)[0]

    return search


def bm25_rank(task, split_identifiers=False, k=100):
    """BM25's ranking of a task (n, k). split_identifiers: read_csv is read and csv, as our
    tokenizer sees it; the stronger baseline on code."""

    def split(texts):
        return [text.replace("_", " ") if split_identifiers else text for text in texts]

    return bm25_index(split(task.documents))(split(task.queries), k)
