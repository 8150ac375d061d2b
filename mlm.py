"""Stage 1: masked language modelling (sec. 4.1). Random weights become a model of language.

Hide some tokens of a text and let the model predict them. To do that well it must learn words,
grammar, and something of what the text is about. Any text will do: nobody has to label it.

    python mlm.py                            # the laptop preset: minutes on two CPU cores
    python mlm.py --help                     # all options
    torchrun --nproc-per-node=8 mlm.py --preset=paper --data=DIR

What the paper changes in BERT's recipe: 30% of the tokens are masked instead of 15% (after Wettig
et al., arXiv 2202.08005); there is no next-sentence task; texts are joined, and split where a
sequence is full; and a sequence has 2,048 tokens.

An untrained model spreads its guesses over the vocabulary, so the loss begins near ln V: 9.0 for a
vocabulary of 8,192.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common import distributed
from common.device import choose_dtype, move_to_device, training_flops
from common.files import load_tokenizer
from common.options import cli, read_options
from common.run import Run, adamw, learning_rate, set_lr
from data import store
from data.sequences import Sequences
from model import SHARED_PRESETS, ModelConfig, NomicBertForMaskedLM


@dataclass
class Config:
    preset: str = "laptop"  # a named set of values: laptop, gpu or paper
    data: str = "out/pydocs"  # a data folder: python data/pydocs.py makes this one
    out: str = "out/mlm"  # for the checkpoint and the log
    resume: bool = False  # insist on continuing the run in OUT (the same command does it anyway)
    seed: int = 0  # decides the first weights, the order of the data, and the masks [0, 1e18]
    precision: str = "auto"  # of activations; auto: bf16 where it is faster [auto, bf16, float32]
    compile: bool = False  # fuse the operations of a block: pays in runs of many minutes

    hidden_size: int = 256  # C [2, 65536]
    num_hidden_layers: int = 2  # transformer blocks [1, 1000]
    num_attention_heads: int = 4  # H; heads of 64 features, as the paper's [1, 1000]
    intermediate_size: int = 512  # width of the feed-forward layers [1, 1e6]
    rope_base: float = 1000.0  # sec. 3.4 [1, 1e9]

    seq_len: int = 128  # tokens of a sequence; Dynamic NTK is for longer texts [4, 1e6]
    mask_probability: float = 0.30  # share of tokens to predict (sec. 4.1.2) [0.01, 0.99]
    batch_size: int = 16  # sequences in a step, over all processes [1, 1e6]
    micro_batch_tokens: int = 4096  # tokens in one pass through the model: what fits a CPU's cache

    steps: int = 500  # optimizer steps; 8,000 before embeddings get better by it (docs/results.md)
    lr: float = 2e-3  # peak of the learning rate; small models need a larger one [0, 1000]
    warmup: int = 30  # steps in which the rate rises [0, 1e9]
    decay: str = "linear"  # of the rate after that [code] [linear, sqrt]
    weight_decay: float = 1e-5  # of matrices; norms have none [0, 1]
    beta2: float = 0.98  # of AdamW; beta1 is 0.9 [0, 0.99999]

    log_every: int = 10  # steps between lines of the log
    eval_every: int = 100  # steps between scores on held-out text; 0: never [0, 1e9]
    save_every: int = 100  # steps between checkpoints


PRESETS = {
    "laptop": {},
    "gpu": {
        **SHARED_PRESETS["gpu"],
        "seq_len": 512,
        "batch_size": 256,
        "steps": 4000,
        "lr": 1e-3,
        "warmup": 240,
        "eval_every": 500,
        "save_every": 500,
    },
    "paper": {  # sec. 4.1.2 and table 2 where nothing else is said
        **SHARED_PRESETS["paper"],
        "seq_len": 2048,
        "batch_size": 4096,
        "steps": 100_000,
        "lr": 5e-4,  # the code of the time has 1e-3, which the paper found unstable
        "warmup": 6000,
        "weight_decay": 1e-5,
        "beta2": 0.98,
        "eval_every": 1000,
        "save_every": 1000,
    },
}


# ------------------------------------------------------------------------------------------------
# The lesson: masking


def mask_tokens(tokens, probability, rng, mask_id, special_ids, vocab_size):
    """Chooses tokens to predict, and hides them (Devlin et al., arXiv 1810.04805, sec. 3.1).

    tokens (L,) -> inputs (L,), chosen (L,) bool. special_ids are never chosen. Of the chosen
        80% become [MASK];
        10% become a random token, so that a token that is no [MASK] may be wrong;
        10% stay, so that the model must also encode what it sees: later stages have no [MASK]."""
    chosen = (rng.random(len(tokens)) < probability) & ~np.isin(tokens, special_ids)
    kind = rng.random(len(tokens))
    inputs = np.where(chosen & (kind < 0.8), mask_id, tokens)
    at_random = chosen & (kind >= 0.8) & (kind < 0.9)
    inputs[at_random] = rng.integers(vocab_size, size=at_random.sum())
    return inputs, chosen


class Masker:
    """mask_tokens for the sequences of a batch. The mask of each depends on its own seed alone."""

    def __init__(self, tokenizer):
        special = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
        self.special_ids = [tokenizer.token_to_id(token) for token in special]
        self.mask_id, self.vocab_size = self.special_ids[-1], tokenizer.get_vocab_size()

    def __call__(self, sequences, probability, seeds):
        """B id arrays and as many seeds -> packed inputs (N,), cu_seqlens (B + 1,), the positions
        of the chosen tokens (M,), and their ids (M,): the targets."""
        ids = (self.mask_id, self.special_ids, self.vocab_size)
        masked = [
            mask_tokens(sequence, probability, np.random.default_rng(seed), *ids)
            for sequence, seed in zip(sequences, seeds, strict=True)
        ]
        inputs, chosen = zip(*masked, strict=True)
        inputs, cu_seqlens = store.pack(inputs)
        positions = np.flatnonzero(np.concatenate(chosen))
        targets = np.concatenate(sequences)[positions]
        return inputs, cu_seqlens, torch.from_numpy(positions), torch.from_numpy(targets)


# ------------------------------------------------------------------------------------------------
# The lesson: the loss


def mlm_loss(logits, targets):
    """Cross-entropy of the masked tokens, summed: (M, V), (M,) -> a number. bf16 is too coarse for
    a sum over the vocabulary."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), targets, reduction="sum")


def backward_in_chunks(model, batch, total, logits_in_memory=1 << 25):
    """Adds the gradient of mlm_loss / total to the weights and returns that loss, with some rows of
    the logits in memory at a time. total: the number of masked tokens in the global batch, so that
    micro-batches add up to its mean loss.

    Logits (M, V) are the largest matrix of all: 2.4 GB for the 20,000 masked tokens of a
    micro-batch of the paper preset, and as much again for their gradient. So the head runs forward
    and backward for some tokens, then for the next ones; the encoder runs backward once, from the
    gradient of its hidden states. No logits are computed twice, as they are in
    info_nce_in_blocks (contrastive.py): here they are a good part of the work."""
    tokens, cu_seqlens, positions, targets = batch
    hidden = model.bert(tokens, cu_seqlens).index_select(0, positions)  # (M, C)
    detached = hidden.detach().requires_grad_()  # the head's graph ends here
    rows, loss = max(1, logits_in_memory // model.config.vocab_size), 0.0
    for x, target in zip(detached.split(rows), targets.split(rows), strict=True):
        chunk_loss = mlm_loss(model.cls["predictions"](x), target) / total  # of (rows, V) logits
        chunk_loss.backward()
        loss += chunk_loss.detach()
    hidden.backward(detached.grad)
    return loss


# ------------------------------------------------------------------------------------------------
# Held-out text


@torch.no_grad()
def held_out_scores(model, sequences, piece=None, micro_batch_tokens=8192):
    """How well the model predicts masked tokens of held-out sequences. 15% of the tokens are
    masked, as in the released code, and the same ones in every call.

    Returns the loss of each masked token (M,), whether the most likely token is right (M,), and
    the number of the sequence that it is in (M,). piece: reads each sequence in pieces of so many
    tokens, as if they were sequences of their own; it must divide the length of each."""
    masker, scores = Masker(model.bert.tokenizer), []
    for group in store.split_by_tokens([len(ids) for ids in sequences], micro_batch_tokens):
        batch = masker([sequences[i] for i in group], 0.15, [[int(i)] for i in group])
        tokens, cu_seqlens, positions, targets = (x.to(model.bert.device) for x in batch)
        number = torch.bucketize(positions, cu_seqlens[1:], right=True).cpu()  # within the group
        if piece:  # to split a packed batch is to say where its sequences begin
            cu_seqlens = torch.arange(0, len(tokens) + 1, piece, device=tokens.device).int()
        logits = model(tokens, cu_seqlens, positions).float()  # (M, V)
        losses = F.cross_entropy(logits, targets, reduction="none").cpu()
        hits = (logits.argmax(-1) == targets).float().cpu()
        scores.append((losses, hits, torch.from_numpy(group)[number]))
    return tuple(map(torch.cat, zip(*scores, strict=True)))


@torch.no_grad()
def show_guesses(model, text):
    """A text with the model's guesses for its masked tokens: [guess], or [guess, not token] where
    the guess is wrong."""
    tokenizer = model.bert.tokenizer
    shown = [tokenizer.id_to_token(i) for i in text]
    batch = Masker(tokenizer)([text], 0.15, [[0]])
    tokens, cu_seqlens, positions, targets = (x.to(model.bert.device) for x in batch)
    guesses = model(tokens, cu_seqlens, positions).argmax(-1)
    for position, guess, target in zip(positions, guesses, targets, strict=True):
        guess, target = tokenizer.id_to_token(int(guess)), tokenizer.id_to_token(int(target))
        shown[position] = f"[{guess}]" if guess == target else f"[{guess}, not {target}]"
    return " ".join(shown).replace(" ##", "") + " ([guess], or [guess, not token])"


# ------------------------------------------------------------------------------------------------


def main(arguments):
    config, origin = read_options(Config, arguments, PRESETS)
    rank, world, device = distributed.start(config.batch_size)
    run = Run("mlm", config, origin)
    if run.finished:
        return

    tokenizer = load_tokenizer(config.data)
    train = Sequences(f"{config.data}/stage1/train", tokenizer, config.seq_len)
    dev = Sequences(f"{config.data}/stage1/dev", tokenizer, config.seq_len)
    held_out = [dev[i] for i in range(min(len(dev), 400))]
    masker = Masker(tokenizer)

    torch.manual_seed(config.seed)
    shape = ModelConfig.from_options(config, tokenizer.get_vocab_size(), config.seq_len)
    model = NomicBertForMaskedLM(shape).to(device)
    model.bert.tokenizer = tokenizer
    model.bert.dtype = choose_dtype(config.precision, device)
    if config.compile:
        model.bert.compile_blocks()
    betas, eps = (0.9, config.beta2), 1e-6  # eps [code]
    optimizer = adamw(model, config.lr, config.weight_decay, betas, eps)
    run.begin(model, optimizer, **model.bert.about())

    share = config.batch_size // world  # sequences of this process
    at_once = max(1, config.micro_batch_tokens // config.seq_len)  # sequences of a micro-batch

    def batch_of(step):
        """This process's share of a batch, in micro-batches; how many tokens of it are masked."""
        rows = train.rows(step, config.batch_size, config.seed)[rank * share : (rank + 1) * share]
        micro_batches = []
        for some in np.split(rows, range(at_once, share, at_once)):
            seeds = [[config.seed, step, row] for row in some]
            sequences = [train[row] for row in some]
            micro_batches.append(masker(sequences, config.mask_probability, seeds))
        return micro_batches, sum(len(positions) for _, _, positions, _ in micro_batches)

    for step, (micro_batches, masked) in run.steps(batch_of):
        optimizer.zero_grad()
        # at least 1, since tiny batches may have none; before the sum, so that no GPU is waited for
        masked = distributed.sum_over_processes(max(1, masked))
        loss = 0.0
        for inputs, cu_seqlens, positions, targets in micro_batches:
            inputs, positions, targets = (
                move_to_device(x, device) for x in (inputs, positions, targets)
            )
            loss += backward_in_chunks(model, (inputs, cu_seqlens, positions, targets), masked)
        distributed.sum_gradients(model)
        lr = set_lr(optimizer, learning_rate(step, config))
        optimizer.step()

        run.tokens += share * config.seq_len
        run.flops += training_flops(shape, [config.seq_len] * share, config.mask_probability)
        if run.log_due(step):
            run.log(step, loss=distributed.sum_over_processes(loss), lr=lr)
        if run.evaluation_due(step):
            losses, hits, _ = held_out_scores(model, held_out)
            number = step // config.eval_every  # another sample in each evaluation
            sample = show_guesses(model, held_out[number % len(held_out)][:40])
            run.log(step, sample, dev_loss=losses.mean(), dev_accuracy=hits.mean())
        run.save(step)


if __name__ == "__main__":
    cli(main)
