"""Speed of training steps, against transformers and sentence-transformers on the same texts.

    python bench/train.py                                 # the laptop model: some minutes
    python bench/train.py --preset=paper --texts=32 --tries=4,16 --rounds=1     # 12 x 768

A step is forward, backward and AdamW on one batch of a natural mix of lengths, tokenized and masked
before. Theirs is measured at its best here: bf16 by autocast where it is fast, the fastest
micro-batch of --tries, MLM texts sorted by length. Ours is compiled on a GPU. The loss of the first
step shows that both compute the same. Padding does not count as tokens.
"""

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import mlm
from bench import shared
from common.device import best_device, fast_dtype
from common.files import load_tokenizer
from common.options import cli, read_options
from data import store
from model import ModelConfig, NomicBert, NomicBertForMaskedLM


@dataclass
class Options:
    preset: str = "laptop"  # whose model, micro-batches, and longest texts
    data: str = "out/pydocs"  # a data folder: texts are pieces of its training text
    texts: int = 256  # MLM texts of a step, and pairs of a step [8, 1e6]
    tries: str = "8,32"  # micro-batches, in texts, that theirs may choose from
    rounds: int = 3  # how often each is timed; the median counts


def training_step(model, backward):
    """A function that calls backward(), then AdamW's step. It returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        loss = backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)  # waits for a GPU

    return step


def masked(tokenizer, texts):
    """(ids, labels) of each text, masked as in mlm.py. Label -100: not to be predicted."""
    tokens, cu_seqlens, positions, targets = mlm.Masker(tokenizer)(texts, 0.3, range(len(texts)))
    labels = torch.full_like(tokens, -100).index_copy(0, positions, targets)
    lengths = cu_seqlens.diff().tolist()
    return list(zip(tokens.split(lengths), labels.split(lengths), strict=True))


def rectangle(texts, fill=0):
    """Padded texts (B, longest)."""
    return pad_sequence(list(map(torch.as_tensor, texts)), True, fill).to(best_device())


def features(texts):
    tokens = rectangle(texts)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}  # 0 is [PAD]


def autocast():
    device, dtype = best_device(), fast_dtype(best_device())
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def our_model(cls, folder):
    model = cls.from_pretrained(folder, fast_dtype(best_device()), device=best_device())
    if best_device().type == "cuda":
        getattr(model, "bert", model).compile_blocks()
    return model


def our_mlm(folder, texts, budget):
    """texts: (ids, labels)."""
    model, batches = our_model(NomicBertForMaskedLM, folder), []
    for group in store.split_by_tokens([len(ids) for ids, _ in texts], budget):
        ids, labels = zip(*(texts[i] for i in group), strict=True)
        labels = torch.cat(labels)
        positions = (labels >= 0).nonzero()[:, 0]
        chosen = positions.to(best_device()), labels[positions].to(best_device())
        batches.append((*store.pack(ids, best_device()), *chosen))
    total = sum(len(targets) for *_, targets in batches)
    backward = partial(mlm.backward_in_chunks, model, total=total)
    return training_step(model, lambda: sum(map(backward, batches)))


def their_mlm(folder, texts, size):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder).to(best_device()).train()
    texts = sorted(texts, key=lambda text: -len(text[0]))
    batches = [zip(*texts[i : i + size], strict=True) for i in range(0, len(texts), size)]
    batches = [(features(ids), rectangle(labels, -100)) for ids, labels in batches]
    masked = [(labels >= 0).sum() for _, labels in batches]

    def backward():
        loss = 0.0
        for (inputs, labels), count in zip(batches, masked, strict=True):
            with autocast():
                part = model(**inputs, labels=labels).loss * (count / sum(masked))
            part.backward()
            loss += part.detach()
        return loss

    return training_step(model, backward)


def our_pairs(folder, pairs, budget):
    """pairs: (query, document)."""
    model = our_model(NomicBert, folder)
    queries, documents = zip(*pairs, strict=True)

    def loss_of(embeddings):
        return contrastive.info_nce_in_blocks(*embeddings.chunk(2), 0.02) / len(pairs)

    texts = [*queries, *documents]
    return training_step(model, partial(contrastive.grad_cache, model, texts, loss_of, budget))


def their_pairs(folder, pairs, size):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(folder, device=str(best_device())).train()
    loss_of = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=size)
    sides = [features(side) for side in zip(*pairs, strict=True)]

    def backward():
        with autocast():  # backward too: it runs forward once more
            loss = loss_of(sides, None)
            loss.backward()
        return loss.detach()

    return training_step(model, backward)


def main(arguments):
    options, _ = read_options(Options, arguments)
    import transformers

    transformers.logging.set_verbosity_error()
    sizes, rng = shared.whole_numbers(options.tries), np.random.default_rng(0)
    stage, _ = read_options(contrastive.Config, [f"--preset={options.preset}"], contrastive.PRESETS)
    tokenizer = load_tokenizer(options.data)
    torch.manual_seed(0)
    shape = ModelConfig.from_options(stage, tokenizer.get_vocab_size(), stage.trained_length)
    model = NomicBertForMaskedLM(shape)
    model.bert.tokenizer = tokenizer

    mix = shared.natural_mix(options.texts, rng).clip(max=stage.trained_length)
    texts = shared.pieces_of_text(options.data, tokenizer, mix, rng)
    short = rng.integers(6, 21, options.texts)
    queries = shared.pieces_of_text(options.data, tokenizer, short, rng)
    pairs = list(zip(queries, texts, strict=True))
    lengths = f"texts of {np.median(mix):.0f} tokens in the median, {mix.max():,} at most"
    shared.print_machine(fast_dtype(best_device()), lengths)
    shared.print_head("step", "", "first loss", "tokens/s", "time / ours")

    tasks = {  # rows, tokens, ours, theirs
        "MLM": (masked(tokenizer, texts), mix.sum(), our_mlm, their_mlm),
        "pairs": (pairs, mix.sum() + short.sum(), our_pairs, their_pairs),
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for task, (rows, tokens, ours, theirs) in tasks.items():
            best = shared.fastest({n: theirs(folder, rows, n) for n in sizes})
            steps = {"ours": ours(folder, rows, stage.micro_batch_tokens)}
            steps[f"theirs, {best} texts"] = theirs(folder, rows, best)
            losses = [step() for step in steps.values()]
            steps["ours"]()  # its second step may be compiled again, for other shapes
            taken = shared.time_in_turns(steps.values(), options.rounds)
            for name, loss, times in zip(steps, losses, taken.T, strict=True):
                cells = f"{loss:.4f}", f"{tokens / np.median(times):,.0f}"
                ratio = f"{np.median(times / taken[:, 0]):.2f}"
                shared.print_row(f"{task}, {tokens:,} tokens", name, *cells, ratio)


if __name__ == "__main__":
    cli(main)
