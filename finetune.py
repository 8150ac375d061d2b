"""Stage 3: finetuning on supervised pairs with hard negatives (sec. 3.3, 4.2.4).

The other documents of a batch are easy to tell from the right one: most are about something else.
Once a model can do that, what is left to learn are the near misses. The model finds them itself:
search all documents with each query; what ranks high and is not the answer is a hard negative.

But some near misses are correct answers that nobody marked, and training against them is wrong. A
document that scores at least as high as the marked answer is probably one too, and is dropped.

    python finetune.py --init=out/contrastive                # from stage 2
    python finetune.py --init=out/contrastive --matryoshka   # embeddings that may be truncated
    python finetune.py --help                                # all options
    torchrun --nproc-per-node=8 finetune.py --preset=paper --init=out/contrastive --data=DIR

The loss is that of stage 2. Each query sees the documents of the whole batch, and the hard
negatives of the whole batch, as in the released code; the paper's eq. 2 has a query's own only.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import contrastive
from common import distributed
from common.device import move_to_device, training_flops
from common.options import cli, read_options
from common.run import Run, adamw, learning_rate, set_lr
from contrastive import backward_batch, embed, first_model, gather, info_nce_in_blocks
from data import store
from data.batches import PairBatches
from metrics import Retrieval, dev_scores


@dataclass
class Config(contrastive.Config):
    """The options of stage 2; below are those that differ, and those that only stage 3 has."""

    out: str = "out/finetune"  # for the checkpoint and the log
    steps: int = 100  # optimizer steps
    lr: float = 1e-3  # peak of the learning rate [0, 1000]
    warmup: int = 10  # steps in which the rate rises [0, 1e9]
    eval_every: int = 50  # steps between scores on held-out pairs; 0: never [0, 1e9]
    save_every: int = 50  # steps between checkpoints

    negatives: int = 1  # hard negatives of a query in a step, drawn from those mined [0, 1000]
    mined: int = 20  # nearest documents below the answer's score, to draw from [1, 10000]
    margin: float = 1.0  # share of the answer's score that marks another answer [0.01, inf]
    matryoshka: bool = False  # train the first 64, 128, 256, ... dimensions as embeddings too


PRESETS = {
    "laptop": {},
    "gpu": {
        **contrastive.PRESETS["gpu"],
        "negatives": 7,
        "batch_size": 256,
        "steps": 500,
        "lr": 5e-5,
        "warmup": 50,
        "decay": "linear",
    },
    "paper": {  # sec. 4.2.4 where nothing else is said
        **contrastive.PRESETS["paper"],
        "negatives": 7,
        "batch_size": 256,
        "query_tokens": 512,  # [code]; the paper says 2,048 for all stages
        "document_tokens": 512,  # [code], likewise
        "steps": 6612,  # one epoch of 1,692,672 pairs (table 3)
        "lr": 2e-5,
        "warmup": 400,
        "decay": "linear",
    },
}


# ------------------------------------------------------------------------------------------------
# The lesson: hard, and negative


def mine_hard_negatives(query, document, right, answers, count, margin=1.0):
    """The documents that are nearest to a query, wrong, and not likely to be right.

    A document that scores at least as high as the query's own one is probably an answer that nobody
    marked. Margin 0.95 also leaves out those up to 5% below; margin inf leaves out none. The
    released miner takes the nearest documents first and drops likely answers then. Of a weak
    model's first 20 that often leaves none, so here they are dropped before.

    query (b, E), document (m, E) at unit length; right (b,): the number of each query's own
    document; answers: for each query the numbers of all documents that are marked as right
    -> negatives (b, count), the hardest first, -1 where there are no more."""
    scores = query @ document.T  # (b, m)
    own = scores.gather(1, right[:, None])  # (b, 1)
    wrong = scores < own - (1 - margin) * own.abs()
    for row, numbers in zip(wrong, answers, strict=True):
        row[[*numbers]] = False
    scores = scores.masked_fill(~wrong, -torch.inf)
    best = scores.topk(min(count, len(document)))
    negatives = best.indices.masked_fill(best.values == -torch.inf, -1)
    return F.pad(negatives, (0, count - negatives.shape[1]), value=-1)


# ------------------------------------------------------------------------------------------------
# Mining a source


def marked_answers(source, query_tokens, document_tokens):
    """Which documents are right for a query, as far as the pairs of a source say. The same text may
    stand in several rows, and what any equal query has as its answer is no negative.

    Returns first (m,): a row with each different document; right (n,): which of these m documents
    each row has; and for each row the set of those that answer its query. Texts are compared as the
    model reads them, truncated."""

    def numbers(column, tokens):
        rows = range(len(source))
        return store.distinct(source.texts(column, [i], tokens)[0].tobytes() for i in rows)

    different, query = numbers("query", query_tokens)
    first, right = numbers("document", document_tokens)
    answers = [set() for _ in different]
    for number, document in zip(query, right.tolist(), strict=True):
        answers[number].add(document)
    return first, right, [answers[number] for number in query]


@torch.no_grad()
def mine_source(model, source, config, scores_in_memory=1 << 28):
    """The negatives of each row (n, count) as rows of the source, hardest first, -1 where there are
    no more. Documents and queries are shared out among the processes; all hold the embeddings of
    all documents: 5 GB for the paper's 1.7 million."""
    first, right, answers = marked_answers(source, config.query_tokens, config.document_tokens)
    count = max(config.mined, config.negatives)

    def embeddings_of(column, rows, tokens):
        return embed(model, source.texts(column, rows, tokens), config.micro_batch_tokens).float()

    document = distributed.compute_in_shares(
        lambda rows: embeddings_of("document", first[rows], config.document_tokens),
        (len(first), model.config.hidden_size),
        torch.float32,
    ).to(model.device)

    def negatives_of(rows):
        query = embeddings_of("query", rows, config.query_tokens)
        own = torch.from_numpy(right[rows]).to(model.device)
        marked = [answers[row] for row in rows]
        mined = mine_hard_negatives(query, document, own, marked, count, config.margin)
        mined = mined.cpu().numpy()
        return np.where(mined < 0, -1, first[mined])

    shape, chunk = (len(source), count), min(4096, max(1, scores_in_memory // len(first)))
    mined = distributed.compute_in_shares(negatives_of, shape, torch.int64, chunk).numpy()
    counts = (mined >= 0).sum(1)
    few = (counts < config.negatives).mean()
    distributed.print_once(
        f"{source.name}: {len(source):,} queries, {len(first):,} different documents, "
        f"{counts.mean():.1f} negatives mined for each query; for {few:.0%} of them fewer than "
        f"{config.negatives}, and random documents instead"
    )
    return mined


def mine(model, sources, config):
    """Mines each source with the model that the run starts with: name -> negatives (n, k). Sources
    that bring negatives keep those ("if not already mined", sec. 4.2.4). A run that continues mines
    again, with the same model and so with the same result."""
    without = [s for s in sources if len(s) and "negative" not in s.columns]
    return {source.name: mine_source(model, source, config) for source in without}


def choose_negatives(source, mined, row, count, max_tokens, rng):
    """Token ids of `count` hard negatives of a row, drawn anew in every step: mined ones, or those
    that the source brings. Where there are too few, random documents of the source fill up, as in
    the released code; the loss does not count those that equal the right one."""
    if source.name in mined:
        column, numbers = "document", mined[source.name][row]
        numbers = numbers[numbers >= 0]
    else:
        column, numbers = "negative", np.array(source.negatives(row), np.int64)
    numbers = rng.choice(numbers, min(count, len(numbers)), replace=False)
    others = rng.integers(len(source), size=count - len(numbers))
    return source.texts(column, numbers, max_tokens) + source.texts("document", others, max_tokens)


# ------------------------------------------------------------------------------------------------
# The lesson: Matryoshka embeddings (Kusupati et al., arXiv 2205.13147)


def matryoshka_sizes(hidden_size):
    """64, 128, 256 and 512, as far as they are below hidden_size, and hidden_size: of 768, those of
    nomic-embed-text-v1.5."""
    return [size for size in (64, 128, 256, 512) if size < hidden_size] + [hidden_size]


def matryoshka_loss(query, document, temperature, first, sizes, keys=None):
    """InfoNCE of the first `size` dimensions, summed over the sizes with weight 1, so that the
    first dimensions alone are an embedding. (v1.5 applies a LayerNorm to each embedding before.)"""
    loss = 0.0
    for size in sizes:
        q, d = F.normalize(query[:, :size], dim=-1), F.normalize(document[:, :size], dim=-1)
        loss = loss + info_nce_in_blocks(q, d, temperature, first, keys)
    return loss


# ------------------------------------------------------------------------------------------------


def main(arguments):
    config, origin = read_options(Config, arguments, PRESETS)
    rank, world, device = distributed.start(config.batch_size)
    run = Run("finetune", config, origin)
    if run.finished:
        return

    model = first_model(config, origin, device)
    sources = store.open_sources(f"{config.data}/stage3", model.tokenizer)
    batches = PairBatches(sources, config.batch_size, config.seed, config.pairs)
    dev = Retrieval.open_all(config.data, "dev", pool=1000, queries=200)
    mined = mine(model, sources, config) if config.negatives else {}
    betas, eps = (0.9, 0.999), 1e-8
    optimizer = adamw(model, config.lr, config.weight_decay, betas, eps)
    run.begin(model, optimizer, **model.about(), **batches.about())
    share = config.batch_size // world  # pairs of this process
    negatives = config.negatives
    size = model.config.hidden_size
    sizes = matryoshka_sizes(size) if config.matryoshka else [size]

    def batch_of(step):
        """This process's share of a batch, all from one source: its queries, then its documents,
        then the hard negatives of its queries."""
        source, rows = batches.at(step)
        rows = rows[rank * share : (rank + 1) * share]
        texts = source.texts("query", rows, config.query_tokens)
        texts += source.texts("document", rows, config.document_tokens)
        for row in rows if negatives else ():
            rng = np.random.default_rng([config.seed, step, row])
            texts += choose_negatives(source, mined, row, negatives, config.document_tokens, rng)
        return source.name, texts, store.text_keys(texts[share:])

    def loss_of(keys, embeddings):  # (share * (1 + negatives),), (share * (2 + negatives), E)
        query, *documents = embeddings.tensor_split([share, 2 * share])  # right ones, negatives
        documents = torch.cat([gather(rows) for rows in documents])  # of all processes
        keys = torch.cat([gather(rows) for rows in keys.tensor_split([share])])
        loss = matryoshka_loss(query, documents, config.temperature, rank * share, sizes, keys)
        return loss / config.batch_size  # this process's part of the mean over the batch

    for step, (source, texts, keys) in run.steps(batch_of):
        optimizer.zero_grad()
        keys = move_to_device(keys, device)
        loss = backward_batch(model, texts, partial(loss_of, keys), config)
        distributed.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        lr = set_lr(optimizer, learning_rate(step, config))
        optimizer.step()

        lengths = [len(text) for text in texts]
        run.tokens += sum(lengths)
        run.flops += training_flops(model.config, lengths)
        if run.log_due(step):
            loss = distributed.sum_over_processes(loss)
            run.log(step, loss=loss, lr=lr, gradient_norm=norm, source=source)
        if run.evaluation_due(step):
            number = step // config.eval_every
            scores, sample = dev_scores(model, dev, config.trained_length, number)
            run.log(step, sample, **scores)
        run.save(step)


if __name__ == "__main__":
    cli(main)
