"""Speed of training steps, against transformers and sentence-transformers on the same texts.

    python bench/train.py                                 # the laptop model
    python bench/train.py --preset=paper --texts=32 --tries=4,16 --rounds=1     # 12 x 768

A step is forward, backward, and AdamW, of one batch of texts with a natural mix of lengths. All
begin with the same weights and have the same data, of which tokenizing is not timed. Theirs run
twice: as they come (float32, batches in the order of the data, of 8 texts as transformers' Trainer
has it and of 32 as the loss of sentence-transformers has it), and at their best here (bf16 by
autocast where it is fast, the micro-batch that is fastest among --tries; masked texts sorted by
length). A first step in float32 shows that all compute the same loss.

    masked words    ours: mlm.backpropagate; theirs: NomicBertForMaskedLM
    pairs           ours: contrastive.grad_cache; theirs: CachedMultipleNegativesRankingLoss

Speed is in tokens of the texts, padding not counted.
"""

import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode import lengths_of

import contrastive
import mlm
from common import compile_blocks, model_shape
from data import store
from model import NomicBert, NomicBertForMaskedLM, fast_dtype
from options import InputError, read_options, run
from processes import best_device


@dataclass
class Options:
    preset: str = "laptop"  # whose model, and whose longest texts
    data: str = "out/pydocs"  # a data folder: texts are pieces of its training text
    texts: int = 256  # masked texts of a step, and pairs of a step
    micro_batch_tokens: int = 0  # of ours; 0 is what the preset has
    tries: str = "8,32"  # micro-batches, in texts, that theirs may choose from
    rounds: int = 3  # how often each is timed; the median counts
    compile: bool = False  # compile our blocks
    only: str = ""  # masked or pairs; empty: both
    seed: int = 0  # of texts, masks and weights


def padded(ids, device, fill=0):
    """A list of id arrays as a rectangle (texts, longest)."""
    rows = [torch.from_numpy(np.asarray(row)) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill).to(device)


def timed(step, device):
    began = time.perf_counter()
    loss = float(step())  # waits for a GPU
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, loss


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


# ------------------------------------------------------------------------------------------------
# Masked words


def our_masked_step(model, masked, budget):
    """masked: (inputs, chosen, text) for each text."""
    optimizer, device = adamw(model), model.bert.device
    count = sum(chosen.sum() for _, chosen, _ in masked)

    def step():
        loss = 0.0
        for group in store.micro_batches([len(text) for *_, text in masked], budget):
            inputs, chosen, texts = zip(*(masked[i] for i in group), strict=True)
            places = np.flatnonzero(np.concatenate(chosen))
            answers = np.concatenate(texts)[places]
            tokens, cu_seqlens = store.pack(inputs, device)
            where = (store.send(x, device) for x in (places, answers))
            loss += mlm.backpropagate(model, tokens, cu_seqlens, *where, count)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def their_masked_step(model, masked, size, autocast, by_length):
    optimizer, device = adamw(model), model.device
    count = sum(chosen.sum() for _, chosen, _ in masked)
    if by_length:
        masked = sorted(masked, key=lambda row: -len(row[2]))

    def step():
        loss = 0.0
        for start in range(0, len(masked), size):
            inputs, chosen, texts = zip(*masked[start : start + size], strict=True)
            labels = [np.where(c, text, -100) for c, text in zip(chosen, texts, strict=True)]
            mask = padded([np.ones(len(text), int) for text in texts], device)
            share = sum(c.sum() for c in chosen) / count
            with autocast():
                out = model(padded(inputs, device), mask, labels=padded(labels, device, -100))
            part = out.loss * share
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


# ------------------------------------------------------------------------------------------------
# Pairs


def our_pairs_step(model, pairs, budget):
    """pairs: the ids of all queries, then those of all documents."""
    optimizer = adamw(model)

    def loss_of(embeddings):
        return contrastive.info_nce(*embeddings.chunk(2), 0.02) / (len(pairs) // 2)

    def step():
        loss = contrastive.grad_cache(model, pairs, loss_of, budget)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def their_pairs_step(model, pairs, size, autocast):
    from sentence_transformers.sentence_transformer import losses

    optimizer, device = adamw(model), model.device
    loss_of = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=size)
    sides = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]

    def step():
        features = [
            {
                "input_ids": padded(side, device),
                "attention_mask": padded([np.ones(len(text), int) for text in side], device),
            }
            for side in sides
        ]
        with autocast():  # backward too: it goes forward once more
            loss = loss_of(features, None)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ------------------------------------------------------------------------------------------------


def compare(title, ours, theirs, sizes, tokens, options, device):
    """ours() and theirs(size or None as it comes): make a step. Prints the table of one task."""
    seconds = {}
    for size in sizes:  # a warm-up as well
        step = theirs(size)
        step()
        seconds[size] = timed(step, device)[0]
    best = min(seconds, key=seconds.get)
    steps = {"ours": ours(), "theirs, best": theirs(best), "theirs, as it comes": theirs(None)}
    steps["ours"](), steps["ours"]()  # warm, and compiled
    taken = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            taken[name].append(timed(step, device)[0])
    mine = np.array(taken["ours"])
    print(f"\n{title}, {tokens:,} tokens a step; their best micro-batch: {best} texts")
    print(f"{'':24}{'tokens/s':>10}{'texts/s':>10}{'ours is':>10}")
    for name, values in taken.items():
        ratio = statistics.median(np.array(values) / mine)
        middle = statistics.median(values)
        print(
            f"{name:24}{tokens / middle:10,.0f}{options.texts / middle:10,.1f}{ratio:9.2f}x",
            flush=True,
        )


def main(arguments):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    options, _ = read_options(Options, arguments)
    if options.only not in ("", "masked", "pairs"):
        raise InputError(f"--only={options.only}: give masked or pairs")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = best_device()
    stage, _ = read_options(contrastive.Config, [f"--preset={options.preset}"], contrastive.PRESETS)
    tokenizer = store.load_tokenizer(options.data)
    vocab_size, longest = tokenizer.get_vocab_size(), stage.trained_length
    shape = model_shape(stage, vocab_size, longest)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    mix = lengths_of(options)["natural mix"].clip(max=longest).astype(int)
    ids = store.Source(f"{options.data}/stage1/train", tokenizer).columns["document"].tokens

    def piece(length):
        start = int(rng.integers(0, len(ids) - length))
        return ids[start : start + length].astype(np.int64)

    texts = [piece(n) for n in mix]
    queries = [piece(n) for n in rng.integers(6, 21, options.texts)]
    masker = mlm.Masker(tokenizer)
    special = (masker.mask_id, masker.special_ids, vocab_size)
    masked = [(*mlm.mask_tokens(text, 0.3, rng, *special), text) for text in texts]

    dtype, budget = fast_dtype(device), options.micro_batch_tokens or stage.micro_batch_tokens
    fast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in NomicBert(shape).parameters())
    print(
        f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, {dtype}, "
        f"{parameters:,} parameters; {len(texts)} texts, median {np.median(mix):.0f} tokens, "
        f"longest {mix.max():,}"
    )
    with tempfile.TemporaryDirectory() as folder:
        whole, encoder = f"{folder}/whole", f"{folder}/encoder"
        NomicBertForMaskedLM(shape).save_pretrained(whole)
        NomicBert.from_pretrained(whole).save_pretrained(encoder)

        def our(cls):
            model = cls.from_pretrained(whole).to(device)
            encoder = model if cls is NomicBert else model.bert
            encoder.dtype = dtype
            if options.compile:
                compile_blocks(encoder)
            return model

        def our_masked():
            return our_masked_step(our(NomicBertForMaskedLM), masked, budget)

        def our_pairs():
            return our_pairs_step(our(NomicBert), [*queries, *texts], budget)

        def their_masked(size):
            model = AutoModelForMaskedLM.from_pretrained(whole).to(device).train()
            best = size is not None
            context = (lambda: fast) if best else nullcontext
            return their_masked_step(model, masked, size or 8, context, by_length=best)

        def their_pairs(size):
            model = SentenceTransformer(encoder, device=str(device)).train()
            context = (lambda: fast) if size else nullcontext
            return their_pairs_step(model, [*queries, *texts], size or 32, context)

        sizes = [int(size) for size in options.tries.split(",")]
        same(whole, encoder, masked[:8], [*queries[:8], *texts[:8]])
        total = int(mix.sum())
        if options.only != "pairs":
            compare("masked words", our_masked, their_masked, sizes, total, options, device)
        if options.only != "masked":
            total += sum(map(len, queries))
            compare("pairs, with GradCache", our_pairs, their_pairs, sizes, total, options, device)


def same(whole, encoder, masked, pairs):
    """Raises AssertionError unless the first losses agree, in float32 on the CPU."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForMaskedLM

    words = NomicBertForMaskedLM.from_pretrained(whole, dtype=torch.float32)
    their_words = AutoModelForMaskedLM.from_pretrained(whole).train()
    model = NomicBert.from_pretrained(encoder, dtype=torch.float32)
    their_model = SentenceTransformer(encoder, device="cpu").train()
    plain = nullcontext
    for ours, theirs in (
        (our_masked_step(words, masked, 4096), their_masked_step(their_words, masked, 3, plain, 1)),
        (our_pairs_step(model, pairs, 4096), their_pairs_step(their_model, pairs, 3, plain)),
    ):
        ours, theirs = float(ours()), float(theirs())
        assert abs(ours - theirs) < 1e-3 * abs(theirs), (ours, theirs)
        print(f"the same loss in float32: {ours:.5f} and {theirs:.5f}")


if __name__ == "__main__":
    run(main)
