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

from common import distributed
from common.device import move_to_device, training_flops
from common.options import InputError, cli, read_options
from common.run import Run, adamw, set_lr
from contrastive import backward_batch, embed, first_model, gather, info_nce_in_blocks
from data import pydocs, store
from evaluate import Retrieval, dev_scores, top_k
from model import SHAPES


@dataclass
class Config:
    preset: str = "laptop"  # a named set of values: laptop, gpu or paper
    data: str = "out/pydocs"  # a data folder; the default one is made where it is missing
    init: str = ""  # a checkpoint to start from, such as out/contrastive; empty: random weights
    out: str = "out/finetune"  # for the checkpoint and the log
    resume: bool = False  # insist on continuing the run in OUT (the same command does it anyway)
    seed: int = 0  # decides first weights, order of the data, and draws of negatives [0, 1e18]
    precision: str = "auto"  # of the activations: bf16, float32, or auto: bf16 where it is faster
    compile: bool = False  # fuse the operations of a block: pays in runs of many minutes

    hidden_size: int = 256  # C; this and the next five come from --init, if given [2, 65536]
    num_hidden_layers: int = 2  # transformer blocks [1, 1000]
    num_attention_heads: int = 4  # H; heads of 64 features, as the paper's [1, 1000]
    intermediate_size: int = 512  # width of the feed-forward layers [1, 1e6]
    rope_base: float = 1000.0  # sec. 3.4 [1, 1e9]
    trained_length: int = 128  # tokens; Dynamic NTK is for longer texts [4, 1e6]

    negatives: int = 1  # hard negatives of a query in a step, drawn from those mined [0, 1000]
    mined: int = 20  # documents nearest to a query, among which its negatives are [1, 10000]
    margin: float = 1.0  # share of the right document's score that marks another answer [0.01, inf]
    batch_size: int = 512  # pairs in a step, over all processes
    weights: str = ""  # faq=2,halves=0.5: repeats of a source in an epoch; empty: as the data says
    query_tokens: int = 48  # queries are truncated to this length [3, 1e6]
    document_tokens: int = 64  # documents are truncated to this length [3, 1e6]
    temperature: float = 0.02  # divides the cosines: a logit scale of 50, fixed [code] [0.001, 100]
    matryoshka: bool = False  # train the first 64, 128, 256, ... dimensions as embeddings too
    micro_batch_tokens: int = 4096  # tokens in one pass through the model: what fits a CPU's cache
    tokens_in_memory: int = 65_536  # a process with more tokens in a step uses GradCache [0, 1e9]

    steps: int = 50  # optimizer steps
    lr: float = 1e-3  # peak of the learning rate [0, 1000]
    warmup: int = 5  # steps in which the rate rises [0, 1e9]
    weight_decay: float = 0.01  # of matrices; norms have none [0, 1]
    clip: float = 1.0  # largest norm of the gradient [0, 1e9]

    log_every: int = 10  # steps between lines of the log
    eval_every: int = 25  # steps between scores on held-out pairs; 0: never [0, 1e9]
    save_every: int = 25  # steps between checkpoints


PRESETS = {
    "laptop": {},
    "gpu": {
        **SHAPES["gpu"],
        "trained_length": 512,
        "negatives": 7,
        "batch_size": 256,
        "query_tokens": 64,
        "document_tokens": 256,
        "micro_batch_tokens": 65_536,
        "tokens_in_memory": 262_144,
        "compile": True,
        "steps": 500,
        "lr": 5e-5,
        "warmup": 50,
        "eval_every": 250,
    },
    "paper": {  # sec. 4.2.4 where nothing else is said
        **SHAPES["paper"],
        "trained_length": 2048,
        "negatives": 7,
        "batch_size": 256,
        "query_tokens": 512,  # [code]; the paper says 2,048 for all stages
        "document_tokens": 512,  # [code], likewise
        "micro_batch_tokens": 65_536,  # ours; it does not change the result
        "tokens_in_memory": 65_536,  # the released code has no GradCache here, and more memory
        "compile": True,
        "steps": 6612,  # one epoch of 1,692,672 pairs (table 3)
        "lr": 2e-5,
        "warmup": 400,
        "eval_every": 1000,
        "save_every": 1000,
    },
}


def learning_rate(step, config):
    """Rises linearly for `warmup` steps, then falls linearly to 0."""
    warmup = max(1, config.warmup)
    left = (config.steps - step) / max(1, config.steps - warmup)
    return config.lr * min((step + 1) / warmup, left)


# ------------------------------------------------------------------------------------------------
# The lesson: hard, and negative


def likely_answers(query, document, right, found, margin=1.0):
    """Which of the documents found for a query are probably answers: those that score at least as
    high as its own document. Margin 0.95 adds those up to 5% below; margin inf finds none.

    query (b, E), document (m, E) at unit length; right (b,), found (b, k) numbers of documents
    -> bool (b, k)."""
    candidates = np.concatenate((right[:, None], found), axis=1)
    scores = np.einsum("be,bke->bk", query, document[candidates])  # equal texts, equal scores
    own, scores = scores[:, :1], scores[:, 1:]
    return scores >= own - (1 - margin) * abs(own)


def mine_hard_negatives(query, document, right, found, known, margin=1.0):
    """Of the documents found for each query, those that are wrong, and not likely to be right.

    query (b, E), document (m, E) at unit length; right (b,) and found (b, k), nearest first:
    numbers of documents; known (b, k): which of them are marked as answers -> negatives (b, k), the
    hardest first, -1 where one was dropped."""
    answers = known | likely_answers(query, document, right, found, margin)
    negatives = np.where(answers, -1, found)
    kept_first = np.argsort(negatives < 0, axis=1, kind="stable")
    return np.take_along_axis(negatives, kept_first, axis=1)


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


def fill_up(negatives, count, documents, answers, rng):
    """Adds random documents to a row's negatives (k,), where -1 means none, until there are
    `count`, as in the released code. Marked answers are never drawn; unmarked ones may be.

    Raises InputError where fewer than `count` documents are left to draw from."""
    if documents - len(answers) < count:
        raise InputError(
            f"--negatives={count}: of {documents} different documents, {len(answers)} answer the "
            "same query"
        )
    filled = negatives[negatives >= 0].tolist()
    while len(filled) < count:
        other = int(rng.integers(documents))
        if other not in answers and other not in filled:
            filled.append(other)
    return filled + [-1] * (len(negatives) - len(filled))


@torch.no_grad()
def mine_source(model, source, config):
    """The negatives of each row (n, k) as rows of the source, hardest first, -1 where there are no
    more. Documents and queries are shared out among the processes; all hold the embeddings of all
    documents: 5 GB for the paper's 1.7 million."""
    first, right, answers = marked_answers(source, config.query_tokens, config.document_tokens)
    documents, width = len(first), max(config.mined, config.negatives)

    def embeddings_of(column, rows, tokens):
        texts = source.texts(column, rows, tokens)
        return embed(model, texts, config.micro_batch_tokens).float().cpu().numpy()

    document = distributed.compute_in_shares(
        lambda rows: embeddings_of("document", first[list(rows)], config.document_tokens),
        (documents, model.config.hidden_size),
        torch.float32,
    ).numpy()

    def negatives_of(rows):
        rows = np.array(rows)
        query = embeddings_of("query", rows, config.query_tokens)
        # one more than asked for: the right document is among them
        _, found = top_k(query, document, min(width + 1, documents), device=model.device)
        known = np.array([[d in answers[r] for d in f] for r, f in zip(rows, found, strict=True)])
        mined = mine_hard_negatives(query, document, right[rows], found, known, config.margin)
        mined = np.pad(mined, ((0, 0), (0, width)), constant_values=-1)[:, :width]
        for i in np.flatnonzero((mined >= 0).sum(1) < config.negatives):
            rng = np.random.default_rng([config.seed, rows[i]])
            mined[i] = fill_up(mined[i], config.negatives, documents, answers[rows[i]], rng)
        return np.where(mined < 0, -1, first[mined])

    shape = (len(source), width)
    mined = distributed.compute_in_shares(negatives_of, shape, torch.int64).numpy()
    distributed.print_once(
        f"{source.name}: {len(source):,} queries, {documents:,} different documents, "
        f"{(mined >= 0).sum() / max(1, len(source)):.1f} negatives mined for each query"
    )
    return mined


def mine(model, sources, config):
    """Mines each source with the model that the run starts with: name -> negatives (n, k). Sources
    that bring negatives keep those ("if not already mined", sec. 4.2.4). A run that continues mines
    again, with the same model and so with the same result."""
    without = [source for source in sources if "negative" not in source.columns]
    return {source.name: mine_source(model, source, config) for source in without}


def choose_negatives(source, mined, row, count, max_tokens, rng):
    """Token ids of `count` hard negatives of a row, drawn anew in every step: mined ones, or those
    that the source brings. A row that brings too few also gets random documents of its source; the
    loss does not count those that equal the right one."""
    if source.name in mined:
        rows = mined[source.name][row]
        rows = rng.choice(rows[rows >= 0], count, replace=False)
        return source.texts("document", rows, max_tokens)
    own = np.array(source.negatives(row), np.int64)
    texts = source.texts("negative", rng.choice(own, min(count, len(own)), False), max_tokens)
    others = rng.integers(len(source), size=count - len(texts))
    return texts + source.texts("document", others, max_tokens)


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
    distributed.call_everywhere(lambda: rank == 0 and pydocs.make_if_missing(config.data))
    run = Run("finetune", config, origin)
    if run.finished:
        return

    model = first_model(config, origin, device)
    sources = store.open_sources(f"{config.data}/stage3", model.tokenizer)
    pairs = store.PairBatches(sources, config.batch_size, config.seed, config.weights)
    dev = Retrieval.open_all(config.data, "dev", pool=1000, queries=200)
    if config.negatives >= (smallest := min(len(s) for s in sources if len(s))):
        raise InputError(f"--negatives={config.negatives}: the smallest source has {smallest} rows")
    mined = mine(model, sources, config) if config.negatives else {}
    betas, eps = (0.9, 0.999), 1e-8
    optimizer = adamw(model, config.lr, config.weight_decay, betas, eps)
    run.begin(model, optimizer, **model.about(), **pairs.about())
    share = config.batch_size // world  # pairs of this process
    negatives = config.negatives
    size = model.config.hidden_size
    sizes = matryoshka_sizes(size) if config.matryoshka else [size]

    def batch_of(step):
        """This process's share of a batch, all from one source: its queries, then its documents,
        then the hard negatives of its queries."""
        source, rows = pairs.at(step)
        rows = rows[rank * share : (rank + 1) * share]
        texts = source.texts("query", rows, config.query_tokens)
        texts += source.texts("document", rows, config.document_tokens)
        for row in rows if negatives else ():
            rng = np.random.default_rng([config.seed, step, row])
            texts += choose_negatives(source, mined, row, negatives, config.document_tokens, rng)
        return source.name, texts, store.text_keys(texts[share:])

    def loss_of(keys, embeddings):  # (share * (1 + negatives),), (share * (2 + negatives), E)
        query, *candidates = embeddings.tensor_split([share, 2 * share])
        candidates = torch.cat([gather(part) for part in candidates])  # of all processes
        keys = torch.cat([gather(part) for part in keys.tensor_split([share])])
        loss = matryoshka_loss(query, candidates, config.temperature, rank * share, sizes, keys)
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
