"""Stage 2: contrastive pretraining on weak pairs (sec. 3.2, 4.2). From words to whole texts.

Take texts that belong together for some cheap reason: a title and its article, a question and its
answer, the name of a function and its documentation. Pull the embeddings of a pair together, and
push the query away from the documents of all other pairs in the batch. Nobody labelled anything;
the paper uses 235 million such pairs.

    python contrastive.py --init=out/mlm     # from stage 1; without --init from random weights
    python contrastive.py --help             # all options
    torchrun --nproc-per-node=2 contrastive.py --init=out/mlm       # two processes, same result
    torchrun --nproc-per-node=8 contrastive.py --preset=paper --init=out/mlm --data=DIR

Four things make it work:
- the loss, InfoNCE: choose the right document among all documents of the batch
- large batches, with more to choose from. GradCache computes them in pieces, with the exact
  gradient
- each batch comes from one source of pairs. Otherwise documents of other sources would be easy
  negatives: their style alone would tell them from the right one
- each text begins with a prefix that names the task (data/prefixes.py says why)

Shapes: b queries of this process, M documents of all processes, E dimensions of an embedding (C, or
fewer with Matryoshka).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import distributed
from common.device import choose_dtype, move_to_device, training_flops
from common.files import load_tokenizer
from common.options import InputError, cli, inherit, read_options
from common.run import Run, adamw, learning_rate, set_lr
from data import store
from data.batches import PairBatches
from metrics import Retrieval, dev_scores
from model import SHAPE, SHARED_PRESETS, ModelConfig, NomicBert


@dataclass
class Config:
    preset: str = "laptop"  # a named set of values: laptop, gpu or paper
    data: str = "out/pydocs"  # a data folder: python data/pydocs.py makes this one
    init: str = ""  # a checkpoint to start from, such as out/mlm; empty: random weights
    out: str = "out/contrastive"  # for the checkpoint and the log
    resume: bool = False  # insist on continuing the run in OUT (the same command does it anyway)
    seed: int = 0  # decides the first weights and the order of the data [0, 1e18]
    precision: str = "auto"  # of activations; auto: bf16 where it is faster [auto, bf16, float32]
    compile: bool = False  # fuse the operations of a block: pays in runs of many minutes

    hidden_size: int = 256  # C; this and the next five come from --init, if given [2, 65536]
    num_hidden_layers: int = 1  # transformer blocks; 0: the mean of word vectors [0, 1000]
    num_attention_heads: int = 4  # H; heads of 64 features, as the paper's [1, 1000]
    intermediate_size: int = 512  # width of the feed-forward layers [1, 1e6]
    rope_base: float = 1000.0  # sec. 3.4 [1, 1e9]
    trained_length: int = 128  # tokens; Dynamic NTK is for longer texts [4, 1e6]

    pairs: int = 0  # train on so many pairs only, the same share of each source; 0: all [0, 1e12]
    batch_size: int = 512  # pairs in a step, over all processes: the documents to choose from
    query_tokens: int = 48  # queries are truncated to this length [3, 1e6]
    document_tokens: int = 64  # documents are truncated to this length [3, 1e6]
    temperature: float = 0.02  # divides the cosines: a logit scale of 50, fixed [code] [0.001, 100]
    micro_batch_tokens: int = 4096  # tokens in one pass through the model: what fits a CPU's cache
    tokens_in_memory: int = 65_536  # a process with more tokens in a step uses GradCache [0, 1e9]

    steps: int = 200  # optimizer steps
    lr: float = 3e-3  # peak; from random weights. After a long stage 1: 3e-4 [0, 1000]
    warmup: int = 20  # steps in which the rate rises [0, 1e9]
    decay: str = "linear"  # of the rate after that, or sqrt, as the paper [linear, sqrt]
    weight_decay: float = 0.01  # of matrices; norms have none [0, 1]
    clip: float = 1.0  # largest norm of the gradient [0, 1e9]

    log_every: int = 10  # steps between lines of the log
    eval_every: int = 100  # steps between scores on held-out pairs; 0: never [0, 1e9]
    save_every: int = 100  # steps between checkpoints


PRESETS = {
    "laptop": {},
    "gpu": {
        **SHARED_PRESETS["gpu"],
        "trained_length": 512,
        "batch_size": 2048,
        "query_tokens": 64,
        "document_tokens": 256,
        "tokens_in_memory": 262_144,
        "steps": 1500,
        "lr": 5e-4,
        "warmup": 150,
        "decay": "sqrt",
        "eval_every": 250,
    },
    "paper": {  # sec. 4.2.3 where nothing else is said
        **SHARED_PRESETS["paper"],
        "trained_length": 2048,
        "batch_size": 16_384,
        "query_tokens": 2048,  # the later reader truncates queries to 32 and
        "document_tokens": 2048,  # documents to 256 tokens [code]
        "steps": 14_316,  # one epoch of 234,553,344 pairs (table 7)
        "lr": 2e-4,  # the paper's first version prints 2e-5
        "warmup": 700,
        "decay": "sqrt",
        "eval_every": 1000,
        "save_every": 1000,
    },
}


# ------------------------------------------------------------------------------------------------
# The lesson: InfoNCE


def info_nce(query, document, temperature, first=0, keys=None):
    """Choose each query's document among all (eq. 1): the sum, over queries, of
    -log softmax(cosines with all documents / temperature)[the right one].

    query (b, E), document (M, E), at unit length. Document first + i is the right one for query i,
    all others are negatives. keys (M,): equal for equal documents; copies of the right one then are
    no negatives. Without keys, identical embeddings give ln M for each query."""
    logits = query @ document.T / temperature  # (b, M)
    right = torch.arange(first, first + len(query), device=query.device)
    logits = logits if keys is None else without_copies(logits, right, keys)
    return F.cross_entropy(logits, right, reduction="sum")


def without_copies(logits, right, keys):
    """Takes copies of the right document out of the negatives, which the released code leaves in.
    With 64 pairs and 8 different documents the loss could not get below ln 8 otherwise.

    logits (b, M), right (b,), keys (M,): equal for equal documents (store.text_keys)."""
    copies = keys[right][:, None] == keys  # (b, M)
    copies.scatter_(1, right[:, None], False)  # the right one itself stays
    return logits.masked_fill(copies, -torch.inf)


def info_nce_in_blocks(query, document, temperature, first=0, keys=None, logits_in_memory=1 << 23):
    """info_nce with at most so many logits in memory: those of 65,536 pairs would take 16 GiB.
    The logits of a block of queries are discarded, and computed again for the gradient, which
    costs little beside the model (mlm.py avoids it, where logits are half the work)."""
    rows = max(1, logits_in_memory // len(document))
    if rows >= len(query):
        return info_nce(query, document, temperature, first, keys)
    loss, how = 0.0, {"use_reentrant": False, "preserve_rng_state": False}
    for i in range(0, len(query), rows):
        block = query[i : i + rows]
        loss += checkpoint(info_nce, block, document, temperature, first + i, keys, **how)
    return loss


class Gather(torch.autograd.Function):
    """The rows of all processes, with gradients: (b, E) -> (world * b, E).

    A document's gradient comes from the queries of all processes. backward adds these parts up and
    gives each process the gradient of its own rows. With a gather that has no gradient, training
    still runs, without an error, in a wrong direction (tests/test_contrastive.py)."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # each process knows a part of the gradient of every row
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """(b, E) -> (world * b, E) with several processes; the same with one."""
    return Gather.apply(x) if dist.is_initialized() else x


# ------------------------------------------------------------------------------------------------
# The lesson: GradCache (Gao et al., arXiv 2101.06983)


def embed(model, texts, micro_batch_tokens):
    """Embeddings of B texts (id arrays), a micro-batch at a time: (B, E), in the order given."""
    groups = store.split_by_tokens([len(text) for text in texts], micro_batch_tokens)
    batches = (store.pack([texts[i] for i in group], model.device) for group in groups)
    embeddings = torch.cat([model.embed(*batch) for batch in batches])  # (B, E), longest text first
    order = move_to_device(np.argsort(np.concatenate(groups)), model.device)
    return embeddings.index_select(0, order)


def grad_cache(model, texts, loss_of, micro_batch_tokens):
    """Backpropagates loss_of(embeddings of all texts), with the activations of one micro-batch in
    memory at a time. Returns the loss.

    The loss of a large batch is not the sum of those of small ones: their queries would miss each
    other's documents. But the loss depends on the weights only through the embeddings, and so, by
    the chain rule,

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
    for group in store.split_by_tokens([len(text) for text in texts], micro_batch_tokens):
        again = model.embed(*store.pack([texts[i] for i in group], model.device))
        again.backward(embeddings.grad.index_select(0, move_to_device(group, model.device)))
    return loss.detach()


def backward_batch(model, texts, loss_of, config):
    """Backpropagates the loss of a batch and returns it. Uses GradCache if the texts have more than
    config.tokens_in_memory tokens, too many to keep the activations of all."""
    if sum(map(len, texts)) > config.tokens_in_memory:
        return grad_cache(model, texts, loss_of, config.micro_batch_tokens)
    loss = loss_of(embed(model, texts, config.micro_batch_tokens))
    loss.backward()
    return loss.detach()


# ------------------------------------------------------------------------------------------------
# The first weights


def first_model(config, origin, device):
    """The encoder that stages 2 and 3 start from: the checkpoint of --init, whose shape and
    tokenizer the run inherits, or random weights."""
    torch.manual_seed(config.seed)
    if config.init:
        model = distributed.call_everywhere(lambda: NomicBert.from_pretrained(config.init))
        if model.tokenizer is None:
            raise InputError(f"{config.init} has no tokenizer.json: copy that of the data there")
        names = (*SHAPE, "rope_base", "trained_length")
        inherit(config, origin, {name: getattr(model.config, name) for name in names}, config.init)
    else:
        distributed.print_once("starting from random weights; --init=DIR: from a checkpoint")
        tokenizer = load_tokenizer(config.data)
        size = tokenizer.get_vocab_size()
        model = NomicBert(ModelConfig.from_options(config, size, config.trained_length))
        model.tokenizer = tokenizer
    if max(config.query_tokens, config.document_tokens) > config.trained_length:
        reason = f"the model is trained for {config.trained_length} tokens"
        raise InputError(f"--query-tokens, --document-tokens: {reason}, give no more")
    model.to(device).train()
    model.dtype = choose_dtype(config.precision, device)
    if config.compile:
        model.compile_blocks()
    return model


# ------------------------------------------------------------------------------------------------


def main(arguments):
    config, origin = read_options(Config, arguments, PRESETS)
    rank, world, device = distributed.start(config.batch_size)
    run = Run("contrastive", config, origin)
    if run.finished:
        return

    model = first_model(config, origin, device)
    sources = store.open_sources(f"{config.data}/stage2", model.tokenizer)
    batches = PairBatches(sources, config.batch_size, config.seed, config.pairs)
    dev = Retrieval.open_all(config.data, "dev", pool=1000, queries=200)
    betas, eps = (0.9, 0.999), 1e-8
    optimizer = adamw(model, config.lr, config.weight_decay, betas, eps)
    run.begin(model, optimizer, **model.about(), **batches.about())
    share = config.batch_size // world  # pairs of this process

    def batch_of(step):
        """This process's share of a batch, all from one source: its queries, then its documents."""
        source, rows = batches.at(step)
        rows = rows[rank * share : (rank + 1) * share]
        queries = source.texts("query", rows, config.query_tokens)
        documents = source.texts("document", rows, config.document_tokens)
        return source.name, queries + documents, store.text_keys(documents)

    def loss_of(keys, embeddings):  # (share,), (2 * share, E)
        query, document = embeddings.chunk(2)
        document, keys = gather(document), gather(keys)  # of all processes: (batch_size, E)
        loss = info_nce_in_blocks(query, document, config.temperature, rank * share, keys)
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
