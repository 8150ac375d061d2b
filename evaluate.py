"""How good is it? Retrieval, masked tokens, long texts; and a search, to try it by hand.

    python evaluate.py                        # the ladder: BM25, random weights, each stage's model
    python evaluate.py search "how do I read a csv file"     # the ten best; no query: a prompt
    python evaluate.py search "..." --model-only             # without BM25
    python evaluate.py long [--model=DIR]     # beyond the trained length, four ways to scale RoPE
    python evaluate.py plot                   # learning curves, ladder, length curves, a map as PNG

and on data from elsewhere, with any checkpoint (--model=DIR, or a name on the hub):

    python evaluate.py sts FILE               # pairs of sentences with scores, csv or tsv
    python evaluate.py retrieval FOLDER       # a task in the BEIR layout, beside BM25
    python evaluate.py mteb --tasks="MTEB(eng, v1)"   # tasks or benchmarks of MTEB by their names

The ladder and the long texts use modules that were held out from all training. Results go to
OUT/results.json.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import find_checkpoint
from common.device import best_device
from common.files import fingerprint, read_json, read_json_lines, write_arrays, write_json
from common.options import InputError, cli, read_options, split_words
from data.store import Sequences, Source
from data.tasks import PREFIXES, read_scored_pairs, read_task, splits_of
from mlm import held_out_scores
from model import NomicBert, NomicBertForMaskedLM

STAGES = "mlm", "contrastive", "finetune"


@dataclass
class Options:
    data: str = "out/pydocs"  # a data folder
    out: str = "out"  # where the stages' runs are; results.json and pictures go there too
    model: str = ""  # a checkpoint directory or a name on the hub; empty: the last stage trained
    split: str = "test"  # held-out texts of ladder and map: test, or dev while tuning
    max_tokens: int = 0  # texts are truncated to this, at least 3; 0: the trained length [0, 1e6]
    dims: int = 0  # sts, retrieval, mteb: the first dimensions only (Matryoshka); 0: all [0, 1e6]
    rope_factor: float = 0.0  # not ladder, long: Dynamic NTK's s, from 1; 0: as saved [0, 1000]
    model_only: bool = False  # search: without BM25
    tasks: str = ""  # mteb: names of tasks and benchmarks, such as "MTEB(Law, v1),SciFact"
    seed: int = 0  # of the random weights and of the map [0, 1e18]


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


def pearson(x, y):
    """Correlation: sum (x - mean x)(y - mean y) over the product of their lengths; -1 to 1.
    Where all x or all y are equal it is not defined: None."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.min() == x.max() or y.min() == y.max():
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def ranks(x):
    """The place of each value in their order, from 1; equal ones share the mean of their places."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the place of the last of each value
    return (last - (counts - 1) / 2)[which]


def spearman(x, y):
    """Pearson's correlation of the ranks: only the order counts, because a cosine need not grow in
    proportion to a score."""
    return pearson(ranks(x), ranks(y))


def summary(values):
    """Mean and standard error; of a single value there is no error: None."""
    values, n = np.asarray(values, float), len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(values.mean()), "error": error}


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
        best_scores = q.new_empty(len(q), 0)
        best_numbers = torch.empty(len(q), 0, dtype=torch.int64, device=device)
        for j in range(0, len(document), block[1]):
            d = torch.as_tensor(document[j : j + block[1]]).to(device)
            scores, numbers = (q @ d.T).topk(min(k, len(d)))
            scores = torch.cat((best_scores, scores), 1)
            numbers = torch.cat((best_numbers, numbers + j), 1)
            best_scores, places = scores.topk(min(k, scores.shape[1]))
            best_numbers = numbers.gather(1, places)
        found.append((best_scores.cpu(), best_numbers.cpu()))
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
    if not any(map(len, known.ids)):  # stop words and single letters alone: nothing is found
        return lambda queries: np.full((len(queries), k), -1)
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
        self.names, self.documents = names, [documents[name] for name in names]
        self.queries = [asked[query] for query in judged]
        self.relevant = [
            {number[document]: grade for document, grade in relevant.items()}
            for relevant in judged.values()
        ]

    @classmethod
    def open_all(cls, data, split, **sample):
        """The retrieval tasks of a data folder, in the order of their names."""
        folders = sorted(path for path in Path(data, "retrieval").glob("*") if path.is_dir())
        if not folders:
            raise InputError(f"no retrieval tasks in {data}: python data/pydocs.py makes some")
        return [cls(folder, split, **sample) for folder in folders]

    def embed(self, model, max_tokens, dims=None):
        """Embeddings of the queries (n, E) and of the documents (m, E), with their prefixes."""
        return tuple(
            model.encode([self.prefixes[side] + text for text in texts], max_tokens, dims)
            for side, texts in (("query", self.queries), ("document", self.documents))
        )

    def rank(self, model, max_tokens, k=100, dims=None):
        """Each query's k best documents (n, k), best first."""
        return top_k(*self.embed(model, max_tokens, dims), k)[1]

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
# The ladder


def ladder(options):
    """BM25, random weights, the model after each stage, and the last one together with BM25, on the
    same held-out queries."""
    tasks, rows = Retrieval.open_all(options.data, options.split), {}
    print(f"{'':28}" + "".join(f"{task.name + ', nDCG@10':>32}{'MRR@10':>10}" for task in tasks))
    for name, split_identifiers in (("BM25", False), ("BM25, identifiers split", True)):
        matched = [task.rank_bm25(split_identifiers) for task in tasks]
        rows[name] = ladder_row(name, tasks, matched)
    for name, model in models_of(options):
        length = options.max_tokens or model.config.trained_length
        rankings = [task.rank(model, length) for task in tasks]
        rows[name] = ladder_row(name, tasks, rankings)
    name, both = "the last stage with BM25", zip(matched, rankings, strict=True)
    rows[name] = ladder_row(name, tasks, list(map(fuse, both)))
    save_results(options.out, "ladder", rows)
    if "mlm" in trained_stages(options.out):
        masked = NomicBertForMaskedLM.from_pretrained(f"{options.out}/mlm", device=best_device())
        folder = f"{options.data}/stage1/{options.split}"
        texts = Sequences(folder, masked.bert.tokenizer, masked.config.trained_length)
        loss, hit = held_out_scores(masked, [texts[i] for i in range(len(texts))])
        accuracy, perplexity = summary(hit), math.exp(loss.mean())
        save_results(options.out, "masked", {"accuracy": accuracy, "perplexity": perplexity})
        print(f"\nafter stage 1: {len(loss):,} masked tokens of {options.split} text, "
              f"{shown(accuracy)} predicted, perplexity {perplexity:.1f}")  # fmt: skip


def shown(score):
    """0.412 ±0.013, from a summary."""
    error = "" if score["error"] is None else f" ±{score['error']:.3f}"
    return f"{score['mean']:.3f}{error}"


def ladder_row(name, tasks, rankings):
    """Prints and returns the scores of a row: task -> metric -> mean and standard error."""
    row, line = {}, f"{name:28}"
    for task, ranking in zip(tasks, rankings, strict=True):
        row[task.name] = {metric: summary(v) for metric, v in task.scores(ranking).items()}
        line += f"{shown(row[task.name]['nDCG@10']):>32}{row[task.name]['MRR@10']['mean']:10.3f}"
    print(line, flush=True)
    return row


def trained_stages(out):
    """The stages that OUT has models of."""
    return [stage for stage in STAGES if Path(out, stage, "model.safetensors").is_file()]


def models_of(options):
    """(name of the row, model) of word vectors alone and of stage 2 from random weights, where OUT
    has them; of random weights; and of each stage that was trained. Raises InputError where none
    was."""
    trained = trained_stages(options.out)
    if not trained:
        raise InputError(f"nothing was trained in {options.out}: python mlm.py, or make demo")
    for name, title in (("words", "word vectors alone"), ("without", "stage 2 without stage 1")):
        if Path(options.out, name, "model.safetensors").is_file():
            yield title, NomicBert.from_pretrained(f"{options.out}/{name}", device=best_device())
    for stage in trained:
        model = NomicBert.from_pretrained(Path(options.out, stage), device=best_device())
        if stage == trained[0]:
            torch.manual_seed(options.seed)
            untrained = NomicBert(model.config).to(model.device)
            untrained.tokenizer, untrained.dtype = model.tokenizer, model.dtype
            yield "random weights", untrained
        yield f"after stage {STAGES.index(stage) + 1}", model


def save_results(out, key, value):
    """Sets one entry of OUT/results.json and keeps the others."""
    path = Path(out, "results.json")
    results = read_json(path) if path.is_file() else {}
    write_json(path, {**results, key: value})


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


def long(options, times=(1, 2, 4, 8, 16)):
    """Masked accuracy after stage 1, and retrieval of long documents by the last stage's model, at
    1, 2, ... 16 times the trained length, or as far as --max-tokens. With --model both are of that
    checkpoint; masked accuracy only if it has an MLM head."""
    encoder, directory, _ = chosen_model(options)
    length, masked, windows = encoder.config.trained_length, None, []
    times = [n for n in times if n * length <= (options.max_tokens or math.inf)]
    if not times:
        raise InputError(f"--max-tokens={options.max_tokens}: give {length}, as trained, or more")
    longest = length * times[-1]
    try:  # a checkpoint of stage 2 or 3 has no MLM head
        head = directory if options.model else f"{options.out}/mlm"
        masked = NomicBertForMaskedLM.from_pretrained(head, device=best_device())
        column = Source(f"{options.data}/stage1/long", masked.bert.tokenizer).columns["document"]
        windows = [
            ids[i : i + longest].astype(np.int64)
            for ids in (column[row] for row in range(len(column)))
            for i in range(0, len(ids) - longest + 1, longest)
        ][:60]
        count = f"{len(windows)} windows of {longest} held-out tokens"
        print(f"{count}: the same masks at every length")
    except InputError as reason:
        print(f"masked accuracy is not measured: {reason}")
    task, table = Retrieval(Path(options.data, "long", "pages"), "test"), {}
    print(f"{len(task.queries)} queries, {len(task.documents)} documents truncated to each length")
    print(f"\n{'':14}{'tokens':>8}{'masked accuracy':>20}{'nDCG@10':>20}")
    for name in scalings(1):
        for n in times:
            if n == 1 and name != "plain RoPE":  # at the trained length all four are the same
                table[name] = {length: table["plain RoPE"][length]}
                continue
            encoder.rope = dataclasses.replace(encoder.rope, **scalings(n)[name])
            rankings = task.rank(encoder, n * length)
            row = {"nDCG@10": task.scores(rankings)["nDCG@10"]}
            if windows:
                masked.bert.rope = dataclasses.replace(masked.bert.rope, **scalings(n)[name])
                row["accuracy"] = held_out_scores(masked, windows, piece=n * length)[1]
            row = {metric: summary(values) for metric, values in row.items()}
            table.setdefault(name, {})[n * length] = row
            cells = (shown(row[key]) if key in row else "" for key in ("accuracy", "nDCG@10"))
            print(f"{name:14}{n * length:8}" + "".join(f"{x:>20}" for x in cells), flush=True)
    if not options.model:
        save_results(options.out, "long", {"trained length": length, "table": table})


# ------------------------------------------------------------------------------------------------
# Data from elsewhere


def last_stage(out):
    """The directory of the last stage that was trained."""
    if not trained_stages(out):
        raise InputError(f"nothing was trained in {out}: make demo, or --model=DIR")
    return Path(out, trained_stages(out)[-1])


def chosen_model(options):
    """(model, its directory, the length that texts are truncated to)."""
    directory = find_checkpoint(options.model) if options.model else last_stage(options.out)
    factor = options.rope_factor or None
    model = NomicBert.from_pretrained(directory, rope_factor=factor, device=best_device())
    return model, directory, options.max_tokens or model.config.trained_length


def sts(options, path):
    """Semantic textual similarity: do cosines order pairs of sentences as people's scores do?

    Both sentences take the prefix of classification, as in the paper (sec. 5.2.1)."""
    first, second, scores = read_scored_pairs(path)
    model, directory, length = chosen_model(options)
    prefixed = ([PREFIXES["classification"] + text for text in texts] for texts in (first, second))
    x, y = (model.encode(texts, length, options.dims or None) for texts in prefixed)
    found = spearman((x * y).sum(1), scores)
    shown_found = "not defined: all cosines are equal" if found is None else f"{found:.4f}"
    print(f"{Path(path).name}, {len(scores):,} pairs: Spearman {shown_found}")
    save_results(options.out, f"sts {path}", {"Spearman": found})


def retrieval(options, folder):
    """The metrics on each split of a task in the BEIR layout, beside BM25."""
    splits = splits_of(folder)
    if not splits:
        raise InputError(f"{folder} has no qrels/*.tsv: the layout of a task is in data/tasks.py")
    tasks = {split: Retrieval(folder, split) for split in splits}
    model, directory, length = chosen_model(options)
    for split, task in tasks.items():
        sizes = f"{len(task.queries):,} queries, {len(task.documents):,} documents"
        print(f"{task.name}, {split}: {sizes}")
        print(f"{'':20}" + "".join(f"{metric:>17}" for metric in METRICS))
        ranking = task.rank(model, length, dims=options.dims or None)
        rankings = {"BM25": task.rank_bm25(), str(directory): ranking}
        for name, ranking in rankings.items():
            row = {metric: summary(values) for metric, values in task.scores(ranking).items()}
            cells = "".join(f"{shown(value):>17}" for value in row.values())
            print(f"{name[-19:]:20}{cells}", flush=True)
            save_results(options.out, f"retrieval {folder} {split} {name}", row)


def named_tasks(library, names):
    """mteb's task objects for names of tasks and benchmarks, such as "MTEB(Law, v1),STS22". Raises
    InputError for a name that mteb does not know."""
    tasks, benchmarks = [], {benchmark.name: benchmark for benchmark in library.get_benchmarks()}
    for name in re.split(r",\s*(?![^()]*\))", names):  # not the commas within brackets
        try:
            tasks += benchmarks[name].tasks if name in benchmarks else [library.get_task(name)]
        except KeyError:
            raise InputError(f"--tasks={name}: give names of mteb's tasks or benchmarks") from None
    return tasks


def mteb(options):
    """MTEB (arXiv 2210.07316) through its own library, which reads the prefix of each type of task
    from the checkpoint, and keeps all scores in OUT/mteb: the same command goes on."""
    try:
        import mteb as library
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError("mteb is not installed: pip install -r requirements-dev.txt") from None
    tasks = named_tasks(library, options.tasks)
    model, directory, length = chosen_model(options)
    with tempfile.TemporaryDirectory() as folder:  # so that published checkpoints have prefixes too
        model.save_pretrained(folder)
        settings = {"device": str(model.device), "truncate_dim": options.dims or None}
        encoder = SentenceTransformer(folder, **settings)
    encoder.max_seq_length = length
    key = fingerprint(f"{fingerprint(directory / 'model.safetensors')} {model.rope}".encode())
    cache = library.ResultCache(Path(options.out, "mteb", f"{key}-{length}-{options.dims}"))
    warnings.simplefilter("ignore")  # mteb warns of prompts that have none of its names
    result = library.evaluate(encoder, tasks, cache=cache, raise_error=False)
    for failed in result.exceptions or ():  # most likely it cannot be downloaded
        reason = str(failed.exception).strip().split("\n")[0]
        print(f"skipped: {failed.task_name}: {reason}")
    if not result.task_results:
        raise InputError("--tasks: no task could be run; the reasons are above")
    print(result.to_dataframe().to_string())


# ------------------------------------------------------------------------------------------------
# Search


def document_embeddings(model, directory, corpus, rows, max_tokens):
    """Embeddings (n, E) of the rows of the file `corpus`, kept beside the checkpoint, because to
    embed them takes minutes. A query then is one text through the model and one matrix product."""
    files = (directory / "model.safetensors", corpus)
    key = " ".join([str(max_tokens), str(model.rope), *map(fingerprint, files)])
    cache = directory / "nanoembed-search.npz"
    with contextlib.suppress(Exception):  # a damaged cache is made again
        kept = np.load(cache)
        if str(kept["key"]) == key and len(kept["embeddings"]) == len(rows):
            return kept["embeddings"].astype(np.float32)
    print(f"embedding {len(rows):,} documents, once for this checkpoint", file=sys.stderr)
    embeddings = model.encode([PREFIXES["document"] + row["text"] for row in rows], max_tokens)
    embeddings = embeddings.astype(np.float16)
    with contextlib.suppress(InputError):  # a read-only checkpoint is searched without a cache
        write_arrays(cache, {"key": key, "embeddings": embeddings})
    return embeddings.astype(np.float32)


def search(options, query=None):
    """Prints the ten best documents with their cosines; without a query, asks for queries until an
    empty line."""
    if query is not None and not query.strip():
        raise InputError('the query is empty: python evaluate.py search "how do I read a csv file"')
    model, directory, length = chosen_model(options)
    corpus = Path(options.data, "search", "corpus.jsonl")
    if not corpus.is_file():
        raise InputError(f"{corpus} is missing: python data/pydocs.py makes out/pydocs")
    rows = []  # names may repeat, so this is not read_texts
    for number, row in read_json_lines(corpus):
        if not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise InputError(f'{corpus}, line {number}: not {{"_id": "...", "text": "..."}}')
        rows.append(row)
    if not rows:
        raise InputError(f"{corpus} has no documents")
    embeddings = document_embeddings(model, directory, corpus, rows, length)
    match = None
    if not options.model_only:
        print("by the model and BM25 together; --model-only: without BM25", file=sys.stderr)
        match = bm25([row["text"] for row in rows], split_identifiers=True)
    for asked in typed_queries() if query is None else [query]:
        query_embedding = model.encode([PREFIXES["query"] + asked])  # (1, E)
        numbers = top_k(query_embedding, embeddings, k=100)[1]
        numbers = fuse([numbers, match([asked])]) if match else numbers
        for number in numbers[0][numbers[0] >= 0][:10]:  # -1: no more were found
            row, cosine = rows[number], float(embeddings[number] @ query_embedding[0])
            text = " ".join(row["text"].removeprefix(row["_id"]).split())
            print(f"{cosine:.3f}  {row['_id']}\n       {text[:90]}")


def typed_queries():
    """What a person types, until an empty line or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input("search> ").strip():
            yield query


# ------------------------------------------------------------------------------------------------
# Pictures


def alignment(query, document):
    """The mean squared distance of pairs (n, E) each, 0 to 4 (Wang and Isola, arXiv 2005.10242):
    small where texts that belong together are together."""
    return float(((query - document) ** 2).sum(1).mean())


def uniformity(x):
    """log of the mean of exp(-2 * squared distance) over all pairs of x (n, E): at most 0,
    and about -4 where many embeddings are spread over the whole sphere."""
    distances = 2 - 2 * x @ x.T
    return float(np.log(np.exp(-2 * distances[~np.eye(len(x), dtype=bool)]).mean()))


def map_of(options, size=2000, queries=3):
    """The same documents under each model, projected to the plane. Returns
    panels: name of the model -> points (n + queries, 2), documents first; what each query finds
    first; alignment; uniformity. groups: the package of each document. queries: the texts of the
    queries. right: the number of the document that answers each."""
    from sklearn.manifold import TSNE

    task = Retrieval.open_all(options.data, options.split, pool=size)[0]
    asked = np.linspace(0, len(task.queries) - 1, queries + 2).astype(int)[1:-1]
    right = np.array([min(relevant) for relevant in task.relevant])
    groups = [re.split(r"[./#]", name)[0].lstrip("_") for name in task.names]
    panels = {}
    for name, model in models_of(options):
        query, document = task.embed(model, model.config.trained_length)
        perplexity = min(30, len(document) // 3)  # roughly how many neighbours a point should have
        settings = {"metric": "cosine", "max_iter": 500, "random_state": options.seed}
        panels[name] = {
            "points": TSNE(perplexity=perplexity, **settings).fit_transform(
                np.concatenate([document, query[asked]])
            ),
            "found": top_k(query[asked], document, 1)[1][:, 0],
            "alignment": alignment(query, document[right]),
            "uniformity": uniformity(document),
        }
    queries = [task.queries[i] for i in asked]
    return {"panels": panels, "groups": groups, "queries": queries, "right": right[asked]}


def plot(options):
    """Pictures of what is in OUT, as PNG."""
    from common.plots import plot_all

    there = trained_stages(options.out) and Path(options.data, "retrieval").is_dir()
    paths = plot_all(options.out, map_of(options) if there else None)
    print("\n".join(f"wrote {path}" for path in paths))


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    command = words.pop(0) if words else "ladder"
    commands = {"ladder": ladder, "long": long, "plot": plot, "mteb": mteb}
    if command == "search":
        search(options, " ".join(words) if words else None)
    elif command in commands and not words:
        commands[command](options)
    elif command in ("sts", "retrieval") and len(words) == 1:
        {"sts": sts, "retrieval": retrieval}[command](options, words[0])
    else:
        raise InputError(
            f"{' '.join([command, *words])}: give search, long, plot, sts FILE, "
            "retrieval FOLDER, mteb, or nothing"
        )


if __name__ == "__main__":
    cli(main)
