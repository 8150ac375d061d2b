"""Speed of training steps, against transformers and sentence-transformers on the same texts.

    python bench/train.py                                 # the laptop model: some minutes
    python bench/train.py --preset=paper --texts=32 --tries=4,16 --rounds=1     # 12 x 768

A step is forward, backward and AdamW on one batch of texts of a natural mix of lengths, tokenized
before. Theirs is measured twice: as it comes (float32, in the order of the data, micro-batches of 8
texts as in transformers' Trainer, of 32 as in sentence-transformers' loss), and at its best here
(bf16 by autocast where it is fast, the fastest micro-batch of --tries; MLM texts sorted by length).
The first loss in float32 shows that all compute the same.

    MLM      ours: mlm.backward_in_chunks; theirs: NomicBertForMaskedLM
    pairs    ours: contrastive.grad_cache; theirs: CachedMultipleNegativesRankingLoss

Speed is in tokens of the texts, padding not counted.
"""

import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import mlm
from bench.shared import natural_mix, pieces_of_text, print_head, print_machine, print_row
from common.device import best_device, fast_dtype, move_to_device
from common.files import load_tokenizer
from common.options import cli, read_options
from data import store
from model import ModelConfig, NomicBert, NomicBertForMaskedLM

NOT_MASKED = -100  # transformers' label of a token that is not to be predicted


@dataclass
class Options:
    preset: str = "laptop"  # whose model, and whose longest texts
    data: str = "out/pydocs"  # a data folder: texts are pieces of its training text
    texts: int = 256  # MLM texts of a step, and pairs of a step [8, 1e6]
    micro_batch_tokens: int = 0  # of ours; 0: that of the preset [0, 1e9]
    tries: str = "8,32"  # micro-batches, in texts, that theirs may choose from
    rounds: int = 3  # how often each is timed; the median counts
    compile: bool = False  # compile our blocks
    seed: int = 0  # of texts, masks and weights [0, 1e18]


def training_step(model, backward):
    """A function that does backward() -> loss, then AdamW's step. It returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        loss = backward()
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


def our_mlm(model, masked, budget):
    """masked: (inputs, labels) of each text."""
    device, total = model.bert.device, sum((y != NOT_MASKED).sum() for _, y in masked)

    def backward():
        loss = 0.0
        for group in store.split_by_tokens([len(x) for x, _ in masked], budget):
            inputs, labels = zip(*(masked[i] for i in group), strict=True)
            labels = np.concatenate(labels)
            positions = np.flatnonzero(labels != NOT_MASKED)
            chosen = (move_to_device(x, device) for x in (positions, labels[positions]))
            loss += mlm.backward_in_chunks(model, (*store.pack(inputs, device), *chosen), total)
        return loss

    return training_step(model, backward)


def their_mlm(model, masked, size, autocast):
    total = sum((labels != NOT_MASKED).sum() for _, labels in masked)

    def backward():
        loss = 0.0
        for start in range(0, len(masked), size):
            inputs, labels = zip(*masked[start : start + size], strict=True)
            labels = padded(labels, model.device, NOT_MASKED)
            with autocast():
                part = model(**features(inputs, model.device), labels=labels).loss
            part = part * ((labels != NOT_MASKED).sum() / total)
            part.backward()
            loss += part.detach()
        return loss

    return training_step(model, backward)


def our_pairs(model, pairs, budget):
    """pairs: all queries, then all documents."""

    def loss_of(embeddings):
        query, document = embeddings.chunk(2)
        return contrastive.info_nce_in_blocks(query, document, 0.02) / len(query)

    return training_step(model, lambda: contrastive.grad_cache(model, pairs, loss_of, budget))


def their_pairs(model, pairs, size, autocast):
    from sentence_transformers.sentence_transformer import losses

    sides = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    loss_of = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=size)

    def backward():
        with autocast():  # backward too: it runs forward once more
            loss = loss_of([features(side, model.device) for side in sides], None)
            loss.backward()
        return loss.detach()

    return training_step(model, backward)


def seconds(step):
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(title, ours, theirs, tokens, options):
    """ours() and theirs(size, or None as it comes) make a step. Prints the rows of one task."""
    first = {}
    for size in map(int, options.tries.split(",")):
        step = theirs(size)
        step()
        first[size] = seconds(step)
    best = min(first, key=first.get)
    steps = {"ours": ours(), f"theirs at its best, {best} texts": theirs(best)}
    steps["theirs as it comes"] = theirs(None)
    steps["ours"](), steps["ours"]()  # warm, and compiled
    taken = [[seconds(step) for step in steps.values()] for _ in range(options.rounds)]
    for name, values in zip(steps, zip(*taken, strict=True), strict=True):
        ratio = statistics.median(t / ours for t, (ours, *_) in zip(values, taken, strict=True))
        middle = statistics.median(values)
        speeds = f"{tokens / middle:,.0f}", f"{options.texts / middle:,.1f}"
        print_row(f"{title}, {tokens:,} tokens", name, *speeds, f"{ratio:.2f}")


def main(arguments):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    options, _ = read_options(Options, arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, rng = best_device(), np.random.default_rng(options.seed)
    dtype = fast_dtype(device)
    stage, _ = read_options(contrastive.Config, [f"--preset={options.preset}"], contrastive.PRESETS)
    budget = options.micro_batch_tokens or stage.micro_batch_tokens
    tokenizer = load_tokenizer(options.data)
    torch.manual_seed(options.seed)
    shape = ModelConfig.from_options(stage, tokenizer.get_vocab_size(), stage.trained_length)
    model = NomicBertForMaskedLM(shape)

    mix = natural_mix(options.texts, rng).clip(max=stage.trained_length)
    texts = pieces_of_text(options.data, tokenizer, mix, rng)
    queries = pieces_of_text(options.data, tokenizer, rng.integers(6, 21, options.texts), rng)
    masker, masked = mlm.Masker(tokenizer), []
    ids = (masker.mask_id, masker.special_ids, masker.vocab_size)
    for text in texts:
        inputs, chosen = mlm.mask_tokens(text, 0.3, rng, *ids)
        masked.append((inputs, np.where(chosen, text, NOT_MASKED)))
    parameters = f"{sum(p.numel() for p in model.bert.parameters()):,} parameters"
    lengths = f"texts of {np.median(mix):.0f} tokens in the median, {mix.max():,} at most"
    print_machine(device, dtype, parameters, lengths)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        half = (
            partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext
        )

        def ours(task, few=None):
            cls, step = (NomicBertForMaskedLM, our_mlm) if task == "MLM" else (NomicBert, our_pairs)
            model = cls.from_pretrained(folder, torch.float32 if few else dtype, device=device)
            if options.compile and not few:
                getattr(model, "bert", model).compile_blocks()
            data = masked[:few] if task == "MLM" else [*queries[:few], *texts[:few]]
            return step(model, data, budget)

        def theirs(task, size, few=None):
            autocast = half if size and not few else nullcontext
            if task == "MLM":
                model = AutoModelForMaskedLM.from_pretrained(folder).to(device).train()
                rows = sorted(masked[:few], key=lambda row: -len(row[0])) if size else masked
                return their_mlm(model, rows, size or 8, autocast)
            model = SentenceTransformer(folder, device=str(device)).train()
            return their_pairs(model, [*queries[:few], *texts[:few]], size or 32, autocast)

        for task in ("MLM", "pairs"):
            a, b = ours(task, few=8)(), theirs(task, 3, few=8)()
            assert abs(a - b) < 1e-3 * abs(b), (a, b)
            print(f"{task}, the same loss in float32: {a:.5f} and {b:.5f}\n")
        print_head("step", "", "tokens/s", "texts/s", "time / ours")
        for task in ("MLM", "pairs"):
            tokens = int(mix.sum()) + (task == "pairs") * sum(map(len, queries))
            compare(task, partial(ours, task), partial(theirs, task), tokens, options)


if __name__ == "__main__":
    cli(main)
