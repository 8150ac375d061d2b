"""Hard negatives for stage 3 (sec. 4.2.4): near misses, found by the model that is to learn them.

Search all documents with each query; what comes near the top and is not the answer is a hard
negative. Two things make that harder than it sounds:

- some near misses are answers that nobody marked, and training against one teaches a falsehood. The
  same text may stand in several rows, so that equal documents count as one here, and what any equal
  query has as its answer is no negative. And a document that scores as high as the marked one
  probably answers too (`likely_answers`)
- comparing all with all takes n * m inner products, and all embeddings together may not fit into
  memory. So they lie in a file, are compared in blocks (retrieval.top_k), and processes share the
  rows. In memory stay some 40 bytes a row, and the result

Asking BM25 (--miner=bm25) finds other near misses: those with the query's words in them.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
import processes
from contrastive import embed
from data import store
from options import InputError
from retrieval import bm25_index, distinct, top_k

# ------------------------------------------------------------------------------------------------
# The lesson: hard, and negative


def likely_answers(query, document, right, found, margin=1.0):
    """Which of the documents that were found for a query are probably right: those that score as
    high as its own, or, at margin 0.95, not more than 5% below. At margin inf, none is.

    query (b, E), document (m, E) at unit length; right (b,), found (b, k) numbers of documents
    -> bool (b, k)."""
    candidates = np.concatenate((right[:, None], found), axis=1)  # in one product: equals are equal
    scores = np.einsum("be,bke->bk", query, document[candidates])
    own, scores = scores[:, :1], scores[:, 1:]
    return scores >= own - (1 - margin) * abs(own)


def mine_hard_negatives(query, document, right, found, known, margin=1.0):
    """Of the documents found for each query, those that are wrong, and not likely to be right.

    query (b, E), document (m, E) at unit length; right (b,) and found (b, k), nearest first:
    numbers of documents; known (b, k): which of them are marked as answers. -> negatives (b, k),
    the hardest first, -1 where one was dropped; and how many were dropped as likely answers."""
    likely = likely_answers(query, document, right, found, margin) & ~known
    negatives = np.where(known | likely, -1, found)
    kept_first = np.argsort(negatives < 0, axis=1, kind="stable")
    return np.take_along_axis(negatives, kept_first, axis=1), int(likely.sum())


def fill_up(negatives, n, m, answers, rng):
    """A row's negatives (k,), with random ones of the m documents behind them until there are n, as
    in the released code. They may be answers that nobody marked; the marked `answers` are not.

    Raises InputError where fewer than n documents are no marked answers."""
    if m - len(answers) < n:
        raise InputError(
            f"--negatives={n}: of {m} different documents, {len(answers)} answer the same query"
        )
    left = negatives[negatives >= 0].tolist()
    while len(left) < n:
        other = int(rng.integers(m))
        left += [other] if other not in answers and other not in left else []
    return left + [-1] * (len(negatives) - len(left))


def choose_negatives(source, mined, row, n, max_tokens, rng):
    """n hard negatives of a row, as token ids, drawn at random and anew in every epoch: its own,
    where the source brings some, else mined ones. A row with fewer own ones gets random documents
    of other rows besides.

    Raises InputError where all documents of a source without enough are the same."""
    if source.name in mined:
        rows = mined[source.name][row]
        return source.texts("document", rng.choice(rows[rows >= 0], n, replace=False), max_tokens)
    given = np.array(source.negatives(row), np.int64)
    texts = source.texts("negative", rng.choice(given, min(n, len(given)), False), max_tokens)
    (own,) = source.texts("document", [row], max_tokens)
    for other in rng.integers(len(source), size=100 + n):
        if len(texts) == n:
            break
        (text,) = source.texts("document", [other], max_tokens)
        texts += [] if np.array_equal(text, own) else [text]
    if len(texts) < n:
        raise InputError(f"{source.name}: row {row} has {len(given)} negatives, and its document "
                         f"is nearly everywhere: lower --negatives={n}")  # fmt: skip
    return texts


class Answers:
    """Which documents are right for a query, as far as the pairs of a source say.

    first (m,): a row of the source with each different document; right (n,): the number of each
    row's document among these m. Texts are compared as the model reads them, cut: documents that
    differ beyond the cut would be the same positive and negative to it."""

    def __init__(self, source, lengths):
        (_, self.asked), (self.first, self.right) = (
            distinct(source.texts(side, [i], tokens)[0].tobytes() for i in range(len(source)))
            for side, tokens in lengths.items()
        )
        self.pairs = np.unique(self.asked * len(self.first) + self.right)

    def known(self, rows, found):
        """Which of the documents `found` (b, k) are marked as answers to the queries of `rows`."""
        return np.isin(self.asked[rows][:, None] * len(self.first) + found, self.pairs)

    def of(self, row):
        """The numbers of all documents that are marked as answers to the query of a row."""
        begin = self.asked[row] * len(self.first)
        where = slice(*np.searchsorted(self.pairs, [begin, begin + len(self.first)]))
        return self.pairs[where] - begin


# ------------------------------------------------------------------------------------------------
# All sources


def check_mining(config, sources):
    """Raises InputError for settings that mining could not work with."""
    if config.miner not in ("model", "bm25"):
        raise InputError(f"--miner={config.miner}: give model or bm25")
    if config.miner == "bm25" and not importlib.util.find_spec("bm25s"):
        raise InputError("--miner=bm25 needs bm25s: pip install -r requirements-extra.txt")
    if not config.margin > 0:
        raise InputError(f"--margin={config.margin}: give more than 0; inf keeps all near misses")
    fewest = min(map(len, sources))
    if config.negatives >= fewest:
        raise InputError(f"--negatives={config.negatives}: the smallest source has {fewest} rows")


@torch.no_grad()
def mine(model, sources, config):
    """Mines each source with the model that the run begins with: name -> numbers of rows, whose
    documents are the negatives (n, mined), the hardest first; -1 where there are no more. Sources
    that bring negatives keep those ("if not already mined", sec. 4.2.4).

    They stay in OUT/negatives.npz: a resumed run, whose model has moved on, needs the same ones."""
    path, scratch = Path(config.out, "negatives.npz"), Path(config.out, "mining.tmp")
    if not path.is_file():
        without = [source for source in sources if "negative" not in source.columns]
        for name in [source.name for source in sources if source not in without]:
            processes.print0(f"{name}: has negatives of its own, and is not mined")
        try:
            mined = {source.name: mine_source(model, source, config, scratch) for source in without}
            if processes.is_first():
                common.replace(path, lambda temporary: np.savez(open(temporary, "wb"), **mined))
        finally:
            if processes.is_first():
                shutil.rmtree(scratch, ignore_errors=True)
    processes.wait_for_all()
    return dict(np.load(path))


def mine_source(model, source, config, scratch):
    """The negatives of one source (n, k) as numbers of its rows, in a file in `scratch`.

    Queries are embedded, searched for and judged a chunk at a time, documents before them all."""
    lengths = {"query": config.query_tokens, "document": config.document_tokens}
    answers, n = Answers(source, lengths), config.negatives
    m, width = len(answers.first), max(config.mined, n)
    dropped = np.zeros(4, np.int64)

    def embedded(side, rows):
        texts = source.texts(side, rows, lengths[side])
        return embed(model, texts, config.micro_batch_tokens).float().cpu().numpy()

    document = shared_rows(
        scratch / f"{source.name}.documents",
        (m, model.config.hidden_size),
        np.float32,
        lambda rows: embedded("document", answers.first[rows]),
    )
    nearest = bm25_miner(model, source, answers.first, lengths) if config.miner == "bm25" else None

    def negatives_of(rows):
        query, k = embedded("query", rows), min(width + 1, m)  # one more: the right one is found
        if nearest:
            found = nearest(rows, k)
        else:
            found = top_k(query, document, k, device=model.device)[1]
        known, right = answers.known(rows, found), answers.right[rows]
        mined, likely = mine_hard_negatives(query, document, right, found, known, config.margin)
        mined = np.pad(mined, ((0, 0), (0, width)), constant_values=-1)[:, :width]
        counts = (mined >= 0).sum(1)
        few = np.flatnonzero(counts < n)
        dropped[:] += counts.sum(), likely, (known & (found != right[:, None])).sum(), len(few)
        for i in few:
            rng = np.random.default_rng([config.seed, rows[i]])
            mined[i] = fill_up(mined[i], n, m, answers.of(rows[i]), rng)
        return np.where(mined < 0, -1, answers.first[mined])

    path = scratch / f"{source.name}.negatives"
    mined = shared_rows(path, (len(source), width), np.int64, negatives_of)
    total = processes.sum_over_processes(torch.from_numpy(dropped)).tolist()
    tell(source.name, len(source), m, total, config)
    return mined


def tell(name, n, m, counts, config):
    kept, likely, known, few = counts
    share = f"{config.margin:g} times" if config.margin != 1 else "as high as"
    processes.print0(
        f"{name}: {n:,} queries, {m:,} different documents, {kept / n:.1f} negatives mined for each"
        f" query by {config.miner}\n"
        f"  dropped {likely:,} near misses as likely answers: they score {share} the right document"
        f" or higher\n"
        f"  dropped {known:,} that are the right document of another row with the same query\n"
        f"  {few:,} queries had fewer than {config.negatives} left, and got random ones"
    )


# ------------------------------------------------------------------------------------------------
# What makes it work at size


def shared_rows(path, shape, dtype, rows_of, chunk=4096):
    """An array of that shape in a file, which all processes fill: rows_of(numbers of b rows) gives
    (b, width), and each process computes every so manyth chunk of rows.

    The chunks are the same for any number of processes, and so are the numbers in them. Raises
    InputError where the file cannot be written."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = range(rank * chunk, shape[0], world * chunk)
    hidden = rank > 0 or len(starts) < 10 or None
    try:
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        processes.wait_for_all()
        with open(path, "r+b") as file:
            for start in tqdm(starts, path.name, disable=hidden, leave=False):
                rows = np.arange(start, min(start + chunk, shape[0]))
                file.seek(start * shape[1] * np.dtype(dtype).itemsize)
                file.write(np.asarray(rows_of(rows), dtype).tobytes())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    processes.wait_for_all()
    return np.memmap(path, dtype, "r", shape=shape)


def bm25_miner(model, source, first, lengths):
    """BM25 instead of the model: (rows, k) -> the k documents with most of each query's rare words.

    It gets what the model reads, turned back into words. What it finds is judged by the model all
    the same: scores of BM25 say little about right and wrong."""

    def words(side, rows):
        column = source.columns[side]
        texts = [store.cut(column[row], lengths[side]).tolist() for row in rows]
        return model.tokenizer.decode_batch(texts)  # without [CLS] and [SEP]

    search = bm25_index(words("document", first))
    return lambda rows, k: search(words("query", rows), k)
