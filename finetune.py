"""Stage 3: finetuning on supervised pairs with hard negatives (sec. 3.3, 4.2.4).

The other documents of a batch are easy to tell from the right one: most are about something else.
Once a model can do that, what is left to learn are the near misses. So it finds them itself: search
all documents with each query; what comes near the top and is not the answer is a hard negative
(mining.py).

Some near misses are answers that nobody marked. A document that scores as high as the marked one
probably is one, and training against it would teach a falsehood; so these are dropped.

    python finetune.py --init=out/contrastive                # from stage 2
    python finetune.py --init=out/contrastive --matryoshka   # embeddings that may be cut short
    python finetune.py --help                                # all options
    torchrun --nproc-per-node=8 finetune.py --preset=paper --init=out/contrastive --data=DIR

The loss is that of stage 2. Each query sees the documents of the whole batch, and the hard
negatives of the whole batch: so the released code; the paper's eq. 2 shows a query's own negatives.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import common
import processes
from check import check_stage
from contrastive import backpropagate, gather, info_nce
from data import store
from estimate import dry_run, speed
from mining import check_mining, choose_negatives, mine
from options import read_options, run
from retrieval import Retrieval, dev_scores


@dataclass
class Config:
    preset: str = "laptop"  # a named set of values: laptop, gpu or paper
    data: str = "out/pydocs"  # a data folder; this one is made where it is missing
    init: str = ""  # a checkpoint to start from, such as out/contrastive; empty: random weights
    out: str = "out/finetune"  # for the checkpoint and log; an earlier run moves to OUT.previous
    resume: bool = False  # continue the run in OUT from its last checkpoint
    check: bool = False  # train nothing, and examine machine, data and a short run instead
    seed: int = 0  # decides the first weights, the order of the data, and which negatives are drawn
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

    negatives: int = 1  # hard negatives of a query in a step, drawn from those mined; 0: none
    mined: int = 20  # documents nearest to a query, among which its negatives are sought
    miner: str = "model"  # what finds them: the model that the run begins with, or bm25
    margin: float = 1.0  # at this share of the right document's score, a near miss is an answer
    batch_size: int = 512  # pairs in a step, over all processes
    query_tokens: int = 48  # queries are cut to this length
    document_tokens: int = 64  # documents are cut to this length
    temperature: float = 0.02  # divides the cosines: a logit scale of 50, fixed [code]
    matryoshka: bool = False  # train the first 64, 128, 256, ... dimensions to be embeddings too
    micro_batch_tokens: int = 4096  # tokens that go through the model at once: what a cache holds
    tokens_in_memory: int = 65_536  # larger batches, in each process, go through GradCache

    steps: int = 50  # optimizer steps
    lr: float = 1e-3  # peak of the learning rate
    warmup: int = 5  # steps in which the rate rises
    weight_decay: float = 0.01  # of matrices; norms have none
    clip: float = 1.0  # longest gradient

    log_every: int = 10  # steps between lines of the log
    eval_every: int = 25  # steps between scores on held-out pairs, with an example (0: never)
    save_every: int = 25  # steps between checkpoints
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
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "trained_length": 2048,
        "negatives": 7,
        "mined": 20,
        "batch_size": 256,
        "query_tokens": 512,  # [code]; the paper says 2,048 for all stages
        "document_tokens": 512,  # [code], likewise
        "micro_batch_tokens": 65_536,  # ours; it does not change the result
        "tokens_in_memory": 65_536,  # the released code has no GradCache here, and more memory
        "compile": True,
        "zero": True,  # ours; [code] has it for masked words only
        "steps": 6612,  # one epoch of 1,692,672 pairs (table 3)
        "lr": 2e-5,
        "warmup": 400,
        "weight_decay": 0.01,
        "clip": 1.0,
        "eval_every": 1000,
        "save_every": 1000,
    },
}


def learning_rate(step, config):
    """Rises linearly for `warmup` steps, then falls linearly to 0."""
    left = (config.steps - step) / max(1, config.steps - config.warmup)
    return config.lr * min((step + 1) / max(1, config.warmup), left)


# ------------------------------------------------------------------------------------------------
# The lesson: Matryoshka embeddings (Kusupati et al., arXiv 2205.13147)


def matryoshka_sizes(hidden_size):
    """64, 128, 256 and 512 as far as they are smaller, and the full size (v1.5, of 768)."""
    return [size for size in (64, 128, 256, 512) if size < hidden_size] + [hidden_size]


def matryoshka_loss(query, document, temperature, first, sizes):
    """InfoNCE of the first dimensions, for each of the sizes, all with weight 1: so the beginning
    of an embedding becomes one. (v1.5 takes off each embedding's mean before, as well.)"""
    loss = 0.0
    for size in sizes:
        q, d = F.normalize(query[:, :size], dim=-1), F.normalize(document[:, :size], dim=-1)
        loss = loss + info_nce(q, d, temperature, first)
    return loss


# ------------------------------------------------------------------------------------------------


def main(arguments):
    config, origin = read_options(Config, arguments, PRESETS)
    if config.dry_run:
        return dry_run("finetune", config)
    if config.check:
        return check_stage(main, arguments, config)
    rank, world, device = processes.start(config)
    common.make_default_data(config.data)
    model = common.open_encoder(config, origin)
    sources = store.open_sources(f"{config.data}/stage3", model.tokenizer)
    pairs = store.PairBatches(sources, config.batch_size, config.seed)
    check_mining(config, sources)
    dev = Retrieval.open_all(config.data, "dev", pool=1000, queries=200)
    common.place(model, model, config, device)
    optimizer = common.adamw(model, config, betas=(0.9, 0.999), eps=1e-8)
    start = common.begin(config, origin, model, optimizer)
    mined = mine(model, sources, config) if config.negatives else {}
    sizes = matryoshka_sizes(model.config.hidden_size)[0 if config.matryoshka else -1 :]
    share = config.batch_size // world  # pairs of this process

    def batch_of(step):
        """This process's share of a batch: queries, their documents, their hard negatives."""
        batch = 0 if config.overfit else step
        source, rows = pairs.at(batch)
        rows = rows[rank * share : (rank + 1) * share]
        texts = source.texts("query", rows, config.query_tokens)
        texts += source.texts("document", rows, config.document_tokens)
        for row in rows if config.negatives else ():
            rng = np.random.default_rng([config.seed, batch, row])
            n, length = config.negatives, config.document_tokens
            texts += choose_negatives(source, mined, row, n, length, rng)
        return source.name, texts

    def loss_of(embeddings):  # (2 * share + share * negatives, E)
        query, document, negative = embeddings.tensor_split([share, 2 * share])
        candidates = torch.cat((gather(document), gather(negative)))  # of all processes
        loss = matryoshka_loss(query, candidates, config.temperature, rank * share, sizes)
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
