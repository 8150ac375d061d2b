"""Speed of training steps, against transformers and sentence-transformers on the same texts.

    python bench/train.py                                 # the laptop model: some minutes
    python bench/train.py --preset=paper --texts=32 --tries=4,16 --rounds=1     # 12 x 768

A step is forward, backward and AdamW on one batch of a natural mix of lengths, tokenized before.
MLM is compared with transformers' NomicBertForMaskedLM, pairs with sentence-transformers'
CachedMultipleNegativesRankingLoss. Theirs is measured twice: as it comes (float32, in the order of
the data, micro-batches of 8 texts as in the Trainer, of 32 as in the loss), and at its best here
(bf16 by autocast where it is fast, the fastest micro-batch of --tries; MLM texts sorted by length).
The first loss in float32 shows that all compute the same. Padding does not count as tokens.
"""

import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import mlm
from bench import shared
from common.device import best_device, fast_dtype, move_to_device
from common.files import load_tokenizer
from common.options import cli, read_options
from data import store
from model import ModelConfig, NomicBert, NomicBertForMaskedLM

NOT_MASKED = -100  # transformers' label of a token that is not to be predicted


@dataclass
class Options:
    preset: str = "laptop"  # whose model, micro-batches, and longest texts
    data: str = "out/pydocs"  # a data folder: texts are pieces of its training text
    texts: int = 256  # MLM texts of a step, and pairs of a step [8, 1e6]
    tries: str = "8,32"  # micro-batches, in texts, that theirs may choose from
    rounds: int = 3  # how often each is timed; the median counts
    compile: bool = False  # compile our blocks


def training_step(backward, model, *arguments):
    """A function that does backward(model, *arguments), then AdamW's step. It returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        loss = backward(model, *arguments)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)  # waits for a GPU

    return step


def padded(texts, device, fill=0):
    """A list of id arrays as a rectangle (texts, longest)."""
    return pad_sequence([torch.from_numpy(x) for x in texts], True, fill).to(device)


def features(texts, device):
    ones = [np.ones(len(text), np.int64) for text in texts]
    return {"input_ids": padded(texts, device), "attention_mask": padded(ones, device)}


def our_mlm(model, rows, budget):
    """rows: (inputs, labels) of each text."""
    device, total = model.bert.device, sum((y != NOT_MASKED).sum() for _, y in rows)
    loss = 0.0
    for group in store.split_by_tokens([len(x) for x, _ in rows], budget):
        inputs, labels = zip(*(rows[i] for i in group), strict=True)
        labels = np.concatenate(labels)
        positions = np.flatnonzero(labels != NOT_MASKED)
        chosen = (move_to_device(x, device) for x in (positions, labels[positions]))
        loss += mlm.backward_in_chunks(model, (*store.pack(inputs, device), *chosen), total)
    return loss


def their_mlm(model, rows, size, autocast):
    loss, total = 0.0, sum((labels != NOT_MASKED).sum() for _, labels in rows)
    for start in range(0, len(rows), size):
        inputs, labels = zip(*rows[start : start + size], strict=True)
        labels = padded(labels, model.device, NOT_MASKED)
        with autocast:
            part = model(**features(inputs, model.device), labels=labels).loss
        part = part * ((labels != NOT_MASKED).sum() / total)
        part.backward()
        loss += part.detach()
    return loss


def our_pairs(model, rows, budget):
    """rows: (query, document)."""

    def loss_of(embeddings):
        query, document = embeddings.chunk(2)
        return contrastive.info_nce_in_blocks(query, document, 0.02) / len(query)

    queries, documents = zip(*rows, strict=True)
    return contrastive.grad_cache(model, [*queries, *documents], loss_of, budget)


def their_pairs(model, rows, size, autocast):
    from sentence_transformers.sentence_transformer import losses

    loss_of = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=size)
    with autocast:  # backward too: it runs forward once more
        loss = loss_of([features(side, model.device) for side in zip(*rows, strict=True)], None)
        loss.backward()
    return loss.detach()


def main(arguments):
    options, _ = read_options(Options, arguments)
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, rng = best_device(), np.random.default_rng(0)
    stage, _ = read_options(contrastive.Config, [f"--preset={options.preset}"], contrastive.PRESETS)
    tokenizer, fast = load_tokenizer(options.data), fast_dtype(device)
    torch.manual_seed(0)
    shape = ModelConfig.from_options(stage, tokenizer.get_vocab_size(), stage.trained_length)
    model = NomicBertForMaskedLM(shape)

    mix = shared.natural_mix(options.texts, rng).clip(max=stage.trained_length)
    texts = shared.pieces_of_text(options.data, tokenizer, mix, rng)
    short = rng.integers(6, 21, options.texts)
    queries = shared.pieces_of_text(options.data, tokenizer, short, rng)
    masker, masked = mlm.Masker(tokenizer), []
    for text in texts:
        ids = masker.mask_id, masker.special_ids, masker.vocab_size
        inputs, chosen = mlm.mask_tokens(text, 0.3, rng, *ids)
        masked.append((inputs, np.where(chosen, text, NOT_MASKED)))
    tasks = {"MLM": masked, "pairs": list(zip(queries, texts, strict=True))}
    parameters = f"{sum(p.numel() for p in model.bert.parameters()):,} parameters"
    lengths = f"texts of {np.median(mix):.0f} tokens in the median, {mix.max():,} at most"
    shared.print_machine(device, fast, parameters, lengths)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def ours(task, rows, dtype):
            cls, step = (NomicBertForMaskedLM, our_mlm) if task == "MLM" else (NomicBert, our_pairs)
            model = cls.from_pretrained(folder, dtype, device=device)
            if options.compile and len(rows) == options.texts:
                getattr(model, "bert", model).compile_blocks()
            return training_step(step, model, rows, stage.micro_batch_tokens)

        def theirs(task, rows, dtype, size):
            half = dtype != torch.float32
            autocast = torch.autocast(device.type, dtype) if half else nullcontext()
            if task == "MLM":
                model, step = AutoModelForMaskedLM.from_pretrained(folder).to(device), their_mlm
            else:
                model, step = SentenceTransformer(folder, device=str(device)), their_pairs
            return training_step(step, model.train(), rows, size, autocast)

        for task, rows in tasks.items():
            a, b = ours(task, rows[:8], torch.float32)(), theirs(task, rows[:8], torch.float32, 3)()
            assert abs(a - b) < 1e-3 * abs(b), (a, b)
            print(f"{task}, the same loss in float32: {a:.5f} and {b:.5f}\n")
        shared.print_head("step", "", "tokens/s", "texts/s", "time / ours")
        for task, rows in tasks.items():
            tokens = int(mix.sum()) + (task == "pairs") * sum(map(len, queries))
            by_length = sorted(rows, key=lambda row: -len(row[0])) if task == "MLM" else rows
            first = {}
            for size in map(int, options.tries.split(",")):
                step = theirs(task, by_length, fast, size)
                step()
                first[size] = shared.seconds_of(step)
            best = min(first, key=first.get)
            steps = {"ours": ours(task, rows, fast)}
            steps[f"theirs at its best, {best} texts"] = theirs(task, by_length, fast, best)
            usual = 8 if task == "MLM" else 32
            steps["theirs as it comes"] = theirs(task, rows, torch.float32, usual)
            steps["ours"](), steps["ours"]()  # warm, and compiled
            rounds = range(options.rounds)  # one after the other, as the machine's speed varies
            taken = np.array([[shared.seconds_of(f) for f in steps.values()] for _ in rounds])
            ratios = np.median(taken / taken[:, :1], 0)
            for name, middle, ratio in zip(steps, np.median(taken, 0), ratios, strict=True):
                speeds = f"{tokens / middle:,.0f}", f"{options.texts / middle:,.1f}"
                shared.print_row(f"{task}, {tokens:,} tokens", name, *speeds, f"{ratio:.2f}")


if __name__ == "__main__":
    cli(main)
