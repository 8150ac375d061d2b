"""Stage 2: contrastive pretraining on weak pairs (sec. 3.2, 4.2). From words to whole texts.

Take texts that belong together for some cheap reason: a title and its article, a question and its
answer, the name of a function and its documentation. Pull the embeddings of a pair together, and
push the query away from the documents of all other pairs in the batch. Nobody labelled anything;
the paper uses 235 million such pairs.

    python contrastive.py --init=out/mlm     # from stage 1; without --init from random weights
    python contrastive.py --help             # all options
    torchrun --nproc-per-node=2 contrastive.py --init=out/mlm       # two processes, same result
    torchrun --nproc-per-node=8 contrastive.py --preset=paper --init=out/mlm --data=DIR

Three things make it work:
- the loss, InfoNCE: to choose the right document among all of the batch
- large batches, which means more to choose from. GradCache computes them in pieces, with the exact
  gradient
- each batch comes from one source of pairs, and each text begins with a prefix that names the task
  (data/store.py)
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
import processes
from check import check_stage
from data import store
from estimate import dry_run, speed
from model import initialize
from options import InputError, read_options, run
from retrieval import Retrieval, dev_scores


@dataclass
class Config:
    preset: str = "laptop"  # a named set of values: laptop, gpu or paper
    data: str = "out/pydocs"  # a data folder; this one is made where it is missing
    init: str = ""  # a checkpoint to start from, such as out/mlm; empty: random weights
    keep: str = "embeddings"  # what of INIT: its word embeddings, or all (as the paper)
    out: str = "out/contrastive"  # for the checkpoint and log; an earlier run moves to OUT.previous
    resume: bool = False  # continue the run in OUT from its last checkpoint
    check: bool = False  # train nothing, and examine machine, data and a short run instead
    seed: int = 0  # decides the first weights and the order of the data
    dry_run: bool = False  # train nothing, and print what a run would take: memory, hours
    precision: str = "auto"  # of the activations: bf16, float32, float64; auto: bf16 where fast
    attention: str = "auto"  # flash-attn, varlen, portable, or auto: the first that works here
    compile: bool = False  # fuse the operations of a block: pays where a run takes many minutes
    zero: bool = False  # share the optimizer's state out among the processes (ZeRO)

    hidden_size: int = 256  # C; this and the next five come from the checkpoint where there is one
    num_hidden_layers: int = 1  # transformer blocks
    num_attention_heads: int = 4  # H; the paper's heads have 64 features too
    intermediate_size: int = 512  # width of the feed-forward layers
    rope_base: float = 1000.0  # sec. 3.4
    trained_length: int = 128  # tokens; Dynamic NTK is for longer texts

    batch_size: int = 512  # pairs in a step, over all processes: the documents to choose from
    query_tokens: int = 48  # queries are cut to this length
    document_tokens: int = 64  # documents are cut to this length: their beginnings say most
    temperature: float = 0.02  # divides the cosines: a logit scale of 50, fixed [code]
    micro_batch_tokens: int = 4096  # tokens that go through the model at once: what a cache holds
    tokens_in_memory: int = 65_536  # larger batches, in each process, go through GradCache

    steps: int = 300  # optimizer steps
    lr: float = 3e-3  # peak of the learning rate; small models bear more than large ones
    warmup: int = 30  # steps in which the rate rises
    weight_decay: float = 0.01  # of matrices; norms have none
    clip: float = 1.0  # longest gradient

    log_every: int = 10  # steps between lines of the log
    eval_every: int = 100  # steps between scores on held-out pairs, with an example (0: never)
    save_every: int = 100  # steps between checkpoints
    stop_after: int = 0  # leave after this step as if interrupted; --resume goes on (0: never)
    overfit: bool = False  # show the first batch again and again: the loss must fall towards 0


PRESETS = {
    "laptop": {},
    "gpu": {
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "trained_length": 512,
        "keep": "all",
        "batch_size": 2048,
        "query_tokens": 64,
        "document_tokens": 256,
        "micro_batch_tokens": 65_536,
        "tokens_in_memory": 262_144,
        "compile": True,
        "steps": 1500,
        "lr": 5e-4,
        "warmup": 150,
        "eval_every": 250,
    },
    "paper": {  # sec. 4.2.3 where nothing else is said
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "trained_length": 2048,
        "keep": "all",
        "batch_size": 16_384,
        "query_tokens": 2048,  # the later reader cuts queries at 32 and
        "document_tokens": 2048,  # documents at 256 tokens [code]
        "micro_batch_tokens": 65_536,  # ours; the released GradCache takes 64 texts [code]
        "tokens_in_memory": 65_536,
        "compile": True,
        "zero": True,  # ours; [code] has it for masked words only
        "steps": 14_316,  # one epoch of 234,553,344 pairs (table 7)
        "lr": 2e-4,  # the paper's first version prints 2e-5
        "warmup": 700,
        "weight_decay": 0.01,
        "clip": 1.0,
        "eval_every": 1000,
        "save_every": 1000,
    },
}


def learning_rate(step, config):
    """Rises linearly for `warmup` steps, then falls with the inverse square root of the step (the
    later code: cosine)."""
    warmup = max(1, config.warmup)
    return config.lr * min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)


# ------------------------------------------------------------------------------------------------
# The lesson: InfoNCE


def info_nce(query, document, temperature, first=0, scores=1 << 23):
    """Choose each query's document among all (eq. 1): the sum, over queries, of
    -log softmax(cosines with all documents / temperature)[the right one].

    query (b, E), document (M, E), at unit length. Document first + i is the right one for query i,
    all others are negatives. Identical embeddings give exactly ln M for each query.

    scores: so many are in memory at a time. More are computed in blocks of rows, whose scores are
    forgotten and computed again for the gradient: of 65,536 pairs, all would take 16 GiB."""

    def of_rows(query, first):
        cosines = query @ document.T  # (rows, M)
        right = torch.arange(first, first + len(query), device=query.device)
        return F.cross_entropy(cosines / temperature, right, reduction="sum")

    rows = max(1, scores // len(document))
    if rows >= len(query):
        return of_rows(query, first)
    blocks = enumerate(query.split(rows))
    again = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random is in it
    return sum(checkpoint(of_rows, q, first + i * rows, **again) for i, q in blocks)


class Gather(torch.autograd.Function):
    """The rows of all processes, with gradients: (b, E) -> (world * b, E).

    What the queries of every process say about a document flows back to the process that encoded
    it. Without that the gradient has another direction, and nothing complains
    (tests/test_contrastive.py shows it)."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # each process knows a part of the gradient of every row
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x


# ------------------------------------------------------------------------------------------------
# The lesson: GradCache (Gao et al., arXiv 2101.06983)


def embed(model, texts, micro_batch_tokens):
    """Embeddings of B texts (id arrays), a micro-batch at a time: (B, E), in the order given."""
    groups = store.micro_batches([len(text) for text in texts], micro_batch_tokens)
    parts = [model.embed(*store.pack([texts[i] for i in group], model.device)) for group in groups]
    order = store.send(np.argsort(np.concatenate(groups)), model.device)
    return torch.cat(parts).index_select(0, order)


def grad_cache(model, texts, loss_of, micro_batch_tokens):
    """Backpropagates loss_of(embeddings of all texts), with the activations of one micro-batch in
    memory at a time. Returns the loss.

    A large batch cannot be summed up from small ones: their queries would miss each other's
    documents. But the loss sees the model only through the embeddings, and so, by the chain rule,

        d loss / d weights  =  sum over texts of  d loss / d embedding  *  d embedding / d weights

    1. embed all texts, and keep no activations
    2. compute the loss of the embeddings, and its gradient for each of them
    3. embed again, a micro-batch at a time, and backpropagate these gradients from there

    It costs a second forward pass, a third more work; the gradient is that of the whole batch."""
    with torch.no_grad():
        embeddings = embed(model, texts, micro_batch_tokens)
    embeddings.requires_grad_()
    loss = loss_of(embeddings)
    loss.backward()
    for group in store.micro_batches([len(text) for text in texts], micro_batch_tokens):
        again = model.embed(*store.pack([texts[i] for i in group], model.device))
        again.backward(embeddings.grad.index_select(0, store.send(group, model.device)))
    return loss.detach()


def backpropagate(model, texts, loss_of, config):
    """The loss of a batch, its gradient added to the weights: through GradCache, unless the
    activations of the whole batch fit in memory."""
    if sum(map(len, texts)) > config.tokens_in_memory:
        return grad_cache(model, texts, loss_of, config.micro_batch_tokens)
    loss = loss_of(embed(model, texts, config.micro_batch_tokens))
    loss.backward()
    return loss.detach()


# ------------------------------------------------------------------------------------------------
# What to keep of stage 1


@torch.no_grad()
def keep_only_embeddings(model):
    """Centres the word embeddings, in their initial size, and begins all else anew.

    The paper keeps everything, and so do the presets that train stage 1 for long. After minutes of
    it, blocks that are kept made stage 2 worse than random weights did, and words that are kept did
    not (README, What each stage adds). Why is a guess: fresh blocks hardly move a token, so that
    the first embedding is a bag of words, which already finds things."""
    words = model.embeddings.word_embeddings.weight.clone()  # (V, C)
    for layer_norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
        layer_norm.reset_parameters()
    initialize(model)
    words -= words.mean(0)
    model.embeddings.word_embeddings.weight.copy_(words * (0.02 / words.std()))


# ------------------------------------------------------------------------------------------------


def main(arguments):
    config, origin = read_options(Config, arguments, PRESETS)
    if config.dry_run:
        return dry_run("contrastive", config)
    if config.check:
        return check_stage(main, arguments, config)
    rank, world, device = processes.start(config)
    common.make_default_data(config.data)
    model = common.open_encoder(config, origin)
    if config.init and config.keep == "embeddings":
        torch.manual_seed(config.seed)
        keep_only_embeddings(model)
    elif config.keep not in ("embeddings", "all"):
        raise InputError(f"--keep={config.keep}: give embeddings or all")
    sources = store.open_sources(f"{config.data}/stage2", model.tokenizer)
    pairs = store.PairBatches(sources, config.batch_size, config.seed)
    dev = Retrieval.open_all(config.data, "dev", pool=1000, queries=200)
    common.place(model, model, config, device)
    optimizer = common.adamw(model, config, betas=(0.9, 0.999), eps=1e-8)
    start = common.begin(config, origin, model, optimizer)
    share = config.batch_size // world  # pairs of this process

    def batch_of(step):
        """This process's share of a batch, all from one source: its queries, then its documents."""
        source, rows = pairs.at(0 if config.overfit else step)
        rows = rows[rank * share : (rank + 1) * share]
        queries = source.texts("query", rows, config.query_tokens)
        return source.name, queries + source.texts("document", rows, config.document_tokens)

    def loss_of(embeddings):  # (2 * share, E)
        query, document = embeddings.chunk(2)
        loss = info_nce(query, gather(document), config.temperature, first=rank * share)
        return loss / config.batch_size  # this process's part of the mean over the batch

    batch_at, began, tokens = common.ahead(batch_of), time.perf_counter(), 0
    for step in (bar := common.steps(start, config)):
        source, texts = batch_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss = backpropagate(model, texts, loss_of, config)
        processes.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        lr = common.set_lr(optimizer, learning_rate(step, config))
        optimizer.step()
        done, tokens = step + 1, tokens + sum(map(len, texts))

        saves = common.saves(done, config)
        if done % config.log_every == 0 or saves:
            loss = common.finite(processes.sum_over_processes(loss), done, config)
            seconds = time.perf_counter() - began  # the loss is there, so a GPU has done it all
            tokens = int(processes.sum_over_processes(tokens))  # since the line before
            record = {"step": done, "loss": loss, "lr": lr, "tokens": tokens}
            record |= speed(model.config, [*map(len, texts)], tokens, seconds, device, world)
            record |= {"gradient_norm": norm.item(), "source": source}
            sample = ""
            due = config.eval_every and (done % config.eval_every == 0 or done == config.steps)
            if due and rank == 0:  # the others wait for it in their next sum
                scores, sample = dev_scores(model, dev, config.trained_length)
                record |= scores
            common.log(config, bar, record, sample)
            if saves:
                common.save(config, model, optimizer, done)
            began, tokens = time.perf_counter(), 0


if __name__ == "__main__":
    run(main)
