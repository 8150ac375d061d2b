"""Stage 1: masked language modelling (sec. 4.1). Random numbers become a model of words.

Hide some tokens of a text and let the model say what stood there. To do that well it must learn
words, grammar, and something of what the text is about; and any text will do, nobody has to label
it.

    python mlm.py                            # the laptop preset: minutes on two CPU cores
    python mlm.py --help                     # all options
    python mlm.py --check                    # is everything in order on this machine?
    torchrun --nproc-per-node=8 mlm.py --preset=paper --data=DIR

What the paper changes in BERT's recipe: 30% of the tokens are masked instead of 15% (after Wettig
et al., arXiv 2202.08005); there is no next-sentence task; texts are packed, so that every sequence
is full; and a sequence has 2,048 tokens.

An untrained model spreads its guesses over the vocabulary, so the loss begins near ln V: 9.0 for a
vocabulary of 8,192.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import common
import processes
from check import check_stage
from data import store
from estimate import dry_run, speed
from model import NomicBertForMaskedLM
from options import read_options, run


@dataclass
class Config:
    preset: str = "laptop"  # a named set of values: laptop, gpu or paper
    data: str = "out/pydocs"  # a data folder; this one is made where it is missing
    out: str = "out/mlm"  # for the checkpoint and the log; an earlier run moves to OUT.previous
    resume: bool = False  # continue the run in OUT from its last checkpoint
    check: bool = False  # train nothing, and examine machine, data and a short run instead
    seed: int = 0  # decides the first weights, the order of the data, and the masks
    dry_run: bool = False  # train nothing, and print what a run would take: memory, hours
    precision: str = "auto"  # of the activations: bf16, float32, float64; auto: bf16 where fast
    attention: str = "auto"  # flash-attn, varlen, portable, or auto: the first that works here
    compile: bool = False  # fuse the operations of a block: pays where a run takes many minutes
    zero: bool = False  # share the optimizer's state out among the processes (ZeRO)

    hidden_size: int = 256  # C
    num_hidden_layers: int = 1  # transformer blocks
    num_attention_heads: int = 4  # H; the paper's heads have 64 features too
    intermediate_size: int = 512  # width of the feed-forward layers
    rope_base: float = 1000.0  # sec. 3.4

    seq_len: int = 128  # tokens of a sequence; Dynamic NTK is for longer texts
    mask_probability: float = 0.30  # share of tokens to predict (sec. 4.1.2)
    batch_size: int = 64  # sequences in a step, over all processes
    micro_batch_tokens: int = 4096  # tokens that go through the model at once: what a cache holds

    steps: int = 200  # optimizer steps
    lr: float = 2e-3  # peak of the learning rate; small models bear more than large ones
    warmup: float = 0.06  # share of the steps in which the rate rises
    weight_decay: float = 1e-5  # of matrices; norms have none
    beta2: float = 0.98  # of AdamW; beta1 is 0.9

    log_every: int = 10  # steps between lines of the log
    eval_every: int = 100  # steps between scores on held-out text, with an example (0: never)
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
        "seq_len": 512,
        "batch_size": 256,
        "micro_batch_tokens": 65_536,
        "compile": True,
        "steps": 4000,
        "lr": 1e-3,
        "eval_every": 500,
        "save_every": 500,
    },
    "paper": {  # sec. 4.1.2 and table 2 where nothing else is said
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "seq_len": 2048,
        "batch_size": 4096,
        "micro_batch_tokens": 65_536,  # ours; it does not change the result
        "compile": True,
        "zero": True,  # [code] has DeepSpeed's stage 2, which shards gradients too
        "steps": 100_000,
        "lr": 5e-4,  # the code of the time has 1e-3, which the paper found unstable
        "warmup": 0.06,
        "weight_decay": 1e-5,
        "beta2": 0.98,
        "eval_every": 1000,
        "save_every": 1000,
    },
}


def learning_rate(step, config):
    """Rises linearly over the first `warmup` of the steps, then falls linearly to 0 [code]."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


# ------------------------------------------------------------------------------------------------
# The lesson: masking


def mask_tokens(tokens, probability, rng, mask_id, special_ids, vocab_size):
    """Chooses tokens to predict, and hides them (Devlin et al., arXiv 1810.04805, sec. 3.1).

    tokens (L,) -> inputs (L,), chosen (L,) bool. Special tokens are never chosen. Of the chosen
        80% become [MASK];
        10% become a random token, so that the model cannot rely on the tokens it sees;
        10% stay, so that a token it sees may be the answer: later stages show it no [MASK]."""
    chosen = (rng.random(len(tokens)) < probability) & ~np.isin(tokens, special_ids)
    fate = rng.random(len(tokens))
    inputs = np.where(chosen & (fate < 0.8), mask_id, tokens)
    at_random = chosen & (fate >= 0.8) & (fate < 0.9)
    inputs[at_random] = rng.integers(vocab_size, size=at_random.sum())
    return inputs, chosen


class Masker:
    """mask_tokens for the texts of a batch. The masks of a text depend on its own seed alone."""

    def __init__(self, tokenizer):
        special = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
        self.special_ids = [tokenizer.token_to_id(token) for token in special]
        self.mask_id, self.vocab_size = self.special_ids[-1], tokenizer.get_vocab_size()

    def __call__(self, texts, probability, seeds):
        """B id arrays and as many seeds -> packed inputs (N,), cu_seqlens (B + 1,), the places of
        the chosen tokens (M,), and what stood there (M,)."""
        masked = []
        for text, seed in zip(texts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            args = (self.mask_id, self.special_ids, self.vocab_size)
            masked.append(mask_tokens(text, probability, rng, *args))
        inputs, cu_seqlens = store.pack([inputs for inputs, _ in masked])
        places = np.flatnonzero(np.concatenate([chosen for _, chosen in masked]))
        answers = np.concatenate(texts)[places]
        return inputs, cu_seqlens, torch.from_numpy(places), torch.from_numpy(answers)


def backpropagate(model, tokens, cu_seqlens, places, answers, masked, scores=1 << 25):
    """The loss of a micro-batch, its gradient added to the weights: the cross-entropy of its masked
    tokens, over `masked`, how many the global batch has. So micro-batches add up to the mean.

    Scores of the vocabulary, (M, V), are the largest matrix of all: 2.4 GB for the 20,000 masked
    tokens of a micro-batch of the paper preset, and as much again for their gradient. The head does
    `scores` of them at a time, forward and backward; the encoder goes backward once, from the
    gradient of its hidden states."""
    hidden = model.bert(tokens, cu_seqlens).index_select(0, places)  # (M, C)
    cut_off = hidden.detach().requires_grad_()
    rows, loss = max(1, scores // model.config.vocab_size), 0.0
    for x, right in zip(cut_off.split(rows), answers.split(rows), strict=True):
        logits = model.cls["predictions"](x)  # (rows, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        part = F.cross_entropy(logits, right, reduction="sum") / masked
        part.backward()
        loss += part.detach()
    hidden.backward(cut_off.grad)
    return loss


@torch.no_grad()
def held_out_scores(model, texts, piece=None, micro_batch_tokens=8192):
    """How well the model fills masks in texts that it never saw: the loss (M,) of each masked
    token, and whether the best guess is right (M,). 15% of the tokens are masked, as in the
    released code, and at every call the same ones.

    piece: shows each text in pieces of so many tokens, as if they were texts of their own."""
    masker, losses, hits = Masker(model.bert.tokenizer), [], []
    for group in store.micro_batches([len(text) for text in texts], micro_batch_tokens):
        batch = masker([texts[i] for i in group], 0.15, [[int(i)] for i in group])
        tokens, cu_seqlens, places, answers = (part.to(model.bert.device) for part in batch)
        if piece:  # to cut a packed batch is to say where its texts begin
            cu_seqlens = torch.arange(0, len(tokens) + 1, piece, dtype=torch.int32)
        scores = model(tokens, cu_seqlens, places).float()  # (M, V)
        losses.append(F.cross_entropy(scores, answers, reduction="none"))
        hits.append((scores.argmax(-1) == answers).float())
    return torch.cat(losses).cpu(), torch.cat(hits).cpu()


@torch.no_grad()
def show_guesses(model, text):
    """A text with the model's guesses for its masked words: [right] or [guess, not answer]."""
    tokenizer = model.bert.tokenizer
    shown = [tokenizer.id_to_token(i) for i in text]
    batch = Masker(tokenizer)([text], 0.15, [[0]])
    tokens, cu_seqlens, places, answers = (part.to(model.bert.device) for part in batch)
    guesses = model(tokens, cu_seqlens, places).argmax(-1)
    for place, guess, answer in zip(places, guesses, answers, strict=True):
        guess, answer = tokenizer.id_to_token(int(guess)), tokenizer.id_to_token(int(answer))
        shown[place] = f"[{guess}]" if guess == answer else f"[{guess}, not {answer}]"
    return " ".join(shown).replace(" ##", "")


# ------------------------------------------------------------------------------------------------


def main(arguments):
    config, origin = read_options(Config, arguments, PRESETS)
    if config.dry_run:
        return dry_run("mlm", config)
    if config.check:
        return check_stage(main, arguments, config)
    rank, world, device = processes.start(config)
    common.make_default_data(config.data)

    tokenizer = store.load_tokenizer(config.data)
    train = store.Sequences(f"{config.data}/stage1/train", tokenizer, config.seq_len)
    dev = store.Sequences(f"{config.data}/stage1/dev", tokenizer, config.seq_len)
    held_out = [dev[i] for i in range(min(len(dev), 400))]
    masker = Masker(tokenizer)

    torch.manual_seed(config.seed)
    shape = common.model_shape(config, tokenizer.get_vocab_size(), config.seq_len)
    model = NomicBertForMaskedLM(shape)
    model.bert.tokenizer = tokenizer
    common.place(model, model.bert, config, device)
    optimizer = common.adamw(model, config, betas=(0.9, config.beta2), eps=1e-6)  # eps [code]
    start = common.begin(config, origin, model, optimizer)

    share = config.batch_size // world  # sequences of this process
    at_once = max(1, config.micro_batch_tokens // config.seq_len)  # sequences of a micro-batch

    def batch_of(step):
        """This process's share of a batch, in micro-batches; and how many tokens it has masked."""
        step = 0 if config.overfit else step
        rows = train.rows(step, config.batch_size, config.seed)[rank * share : (rank + 1) * share]
        micro_batches = []
        for part in np.split(rows, range(at_once, share, at_once)):
            seeds = [[config.seed, step, row] for row in part]
            texts = [train[row] for row in part]
            micro_batches.append(masker(texts, config.mask_probability, seeds))
        return micro_batches, sum(len(places) for _, _, places, _ in micro_batches)

    batch_at, began, tokens = common.ahead(batch_of), time.perf_counter(), 0
    for step in (bar := common.steps(start, config)):
        micro_batches, masked = batch_at(step)
        masked = processes.sum_over_processes(masked)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for inputs, cu_seqlens, places, answers in micro_batches:
            inputs, places, answers = (store.send(x, device) for x in (inputs, places, answers))
            loss += backpropagate(model, inputs, cu_seqlens, places, answers, masked)
        processes.sum_gradients(model)
        lr = common.set_lr(optimizer, learning_rate(step, config))
        optimizer.step()
        done, tokens = step + 1, tokens + config.batch_size * config.seq_len

        saves = common.saves(done, config)
        if done % config.log_every == 0 or saves:
            loss = common.finite(processes.sum_over_processes(loss), done, config)
            seconds = time.perf_counter() - began  # the loss is there, so a GPU has done it all
            record = {"step": done, "loss": loss, "lr": lr, "tokens": tokens}
            share_masked = config.mask_probability
            record |= speed(shape, [config.seq_len], tokens, seconds, device, world, share_masked)
            sample = ""
            due = config.eval_every and (done % config.eval_every == 0 or done == config.steps)
            if due and rank == 0:  # the others wait for it in their next sum
                losses, hits = held_out_scores(model, held_out)
                record |= {"dev_loss": losses.mean().item(), "dev_accuracy": hits.mean().item()}
                sample = show_guesses(model, held_out[done % len(held_out)][:40])
            common.log(config, bar, record, sample)
            if saves:
                common.save(config, model, optimizer, done)
            began, tokens = time.perf_counter(), 0


if __name__ == "__main__":
    run(main)
