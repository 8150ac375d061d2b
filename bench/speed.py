"""Speed and memory: the stages themselves, and single steps and `encode` beside other libraries.

    python bench/speed.py stages                        # tokens/s, share of the matrix rate
    python bench/speed.py stages mlm --preset=gpu       # some stages, with any options of theirs
    python bench/speed.py train                         # training steps, two libraries beside
    python bench/speed.py encode --preset=paper         # `encode`, sentence-transformers beside
    python bench/speed.py memory                        # peak memory, with and without GradCache

stages: the median of 12 steps (--steps), without the first two. Operations are the useful ones
(common/device.py). The matrix rate is that of one layer's products in the same type.

train, encode: transformers and sentence-transformers have the same weights and texts, half
precision where it is fast, and texts sorted by length; the best of --tries is what counts. A
training step is forward, backward and AdamW; texts were tokenized and masked before. Ours is
compiled on a GPU. Padding does not count as tokens. The first loss, or the smallest cosine with our
embeddings, shows that both compute the same.

memory: the peak of a process of its own, on a GPU where there is one, less what it had before the
step. With GradCache only token ids, embeddings and their gradients grow with the batch: 16 C bytes
a pair.
"""

import contextlib
import math
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import mlm
from bench.shared import STAGES, print_table, whole_numbers
from common import run
from common.device import best_device, choose_dtype, fast_dtype
from common.files import load_tokenizer, read_json_lines
from common.options import InputError, cli, read_options, split_words
from data import store
from model import ModelConfig, NomicBert, NomicBertForMaskedLM


@dataclass
class Options:
    preset: str = "laptop"  # of contrastive.py: the model, its micro-batches and longest texts
    data: str = "out/pydocs"  # train, encode: a data folder; texts are pieces of its training text
    texts: int = 256  # train, encode: how many of the natural mix [8, 1e6]
    tries: str = "8,32"  # train, encode: batch sizes of the other libraries, in texts
    rounds: int = 3  # train, encode: how often each is timed; the median counts
    batches: str = "1024,4096,16384"  # memory: pairs
    longest: int = 4096  # memory: the largest batch that is tried without GradCache [0, 1e9]


def matrix_rate(config, device):
    """Operations per second of the matrix products of one layer, (N, C) x (C, 3C) and so on: the
    highest of two N. A GPU needs large matrices, a CPU is fastest while they fit in its cache."""
    C, inner, rates = config.hidden_size, config.intermediate_size, []
    shapes = [(C, 3 * C), (C, C), (C, inner), (C, inner), (inner, C)]
    new = {"dtype": choose_dtype(config.precision, device), "device": device}
    for N in (2048, 8192) if device.type == "cpu" else (8192, 65_536):
        pairs = [(torch.randn(N, a, **new), torch.randn(a, b, **new)) for a, b in shapes]
        threads = torch.get_num_threads()
        timer = Timer("for x, w in pairs: x @ w", globals={"pairs": pairs}, num_threads=threads)
        seconds = timer.blocked_autorange(min_run_time=0.5).median
        rates.append(sum(2 * N * a * b for a, b in shapes) / seconds)
    return max(rates)


def stages(names, arguments):
    titles = "stage", "tokens/s", "MFLOP/token", "TFLOP/s", "matrix rate, TFLOP/s", "share"
    yield *titles, "GPU memory, GiB"
    for name in names or STAGES:
        if name not in STAGES:
            raise InputError(f"{name}: the stages are {', '.join(STAGES)}")
        stage, device, memory = STAGES[name], best_device(), ""
        config, _ = read_options(stage.Config, arguments, stage.PRESETS)
        rate = matrix_rate(config, device)
        run.peak_flops = lambda device, rate=rate: rate  # so that the log has the share of it
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            quiet = ["--log-every=1", "--eval-every=0", "--save-every=1e9", f"--out={folder}/run"]
            stage.main(["--steps=12", *arguments, *quiet])
            log = [record for _, record in read_json_lines(f"{folder}/run/log.jsonl")]
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        steps = [(record["tokens_per_second"], record["share_of_peak"]) for record in log]
        speed, share = np.median(steps[2:] or steps, axis=0)
        flops, rate = share * rate, max(rate, matrix_rate(config, device))  # speeds of a CPU vary
        cells = f"{speed:,.0f}", f"{flops / speed / 1e6:.1f}", f"{flops / 1e12:.3f}"
        yield name, *cells, f"{rate / 1e12:.3f}", f"{flops / rate:.0%}", memory


# ------------------------------------------------------------------------------------------------
# Beside other libraries


def save_random_model(folder, options, config):
    """The checkpoint that both sides open. Returns its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer(options.data)
    torch.manual_seed(0)
    shape = ModelConfig.from_options(config, tokenizer.get_vocab_size(), config.trained_length)
    model = NomicBertForMaskedLM(shape)
    model.bert.tokenizer = tokenizer
    model.save_pretrained(folder)
    return tokenizer


def natural_mix(n, rng):
    """Lengths of n texts in tokens, log-normal as those of web texts: median 70, up to 2,048."""
    return np.exp(rng.normal(math.log(70), 1.0, n)).clip(8, 2048).astype(int)


def pieces_of_text(data, tokenizer, lengths, rng):
    """Pieces of a data folder's training text, with these lengths: a list of id arrays."""
    ids = store.Source(f"{data}/stage1/train", tokenizer).columns["document"].tokens
    starts = rng.integers(0, max(1, len(ids) - 2048), len(lengths))
    return [ids[i : i + n].astype(np.int64) for i, n in zip(starts, lengths, strict=True)]


def compare(title, tokens, works, check, rounds):
    """A row for each of several functions: name -> function, ours first. Each returns a result on
    the CPU; check(result, our result) is the number that shows that both compute the same."""
    results = [work() for work in works.values()]  # warms up, too
    # in turns, since the speed of a machine varies
    taken = np.array([[timeit(work, number=1) for work in works.values()] for _ in range(rounds)])
    for name, result, seconds in zip(works, results, taken.T, strict=True):
        speed, ratio = tokens / np.median(seconds), np.median(seconds / taken[:, 0])
        yield title, name, f"{check(result, results[0]):.4f}", f"{speed:,.0f}", f"{ratio:.2f}"


def training_step(model, batches, backward):
    """A function that calls backward(model, batch) for each batch, and then AdamW's step. It
    returns the sum of the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        loss = sum(backward(model, batch) for batch in batches)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)  # waits for a GPU

    return step


def our_model(cls, folder):
    model = cls.from_pretrained(folder, fast_dtype(best_device()), device=best_device())
    if best_device().type == "cuda":
        getattr(model, "bert", model).compile_blocks()
    return model


def their_backward(loss_of, model, batch):
    device, dtype = best_device(), fast_dtype(best_device())
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(model, *batch)
        loss.backward()  # in autocast, since that of GradCache has a forward pass
    return loss.detach()


def padded(texts, fill=0):
    """(B, longest), on the device."""
    return pad_sequence(list(map(torch.as_tensor, texts)), True, fill).to(best_device())


def features(texts):
    tokens = padded(texts)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}  # 0 is [PAD]


def mlm_steps(folder, texts, budget, sizes):
    """Yields (name, training step): ours, and theirs with each number of texts at once."""
    from transformers import AutoModelForMaskedLM

    lengths, device = [len(text) for text in texts], best_device()
    model, batches, total = our_model(NomicBertForMaskedLM, folder), [], 0
    masker = mlm.Masker(model.bert.tokenizer)  # a text's mask is the same in any batch
    for group in store.split_by_tokens(lengths, budget):
        tokens, cu_seqlens, *masked = masker([texts[i] for i in group], 0.3, group)
        batches.append((tokens.to(device), cu_seqlens, *(x.to(device) for x in masked)))
        total += len(masked[0])
    yield "ours", training_step(model, batches, partial(mlm.backward_in_chunks, total=total))

    for size in sizes:
        model, batches = AutoModelForMaskedLM.from_pretrained(folder).to(device).train(), []
        for group in np.split(np.argsort(lengths)[::-1], range(size, len(texts), size)):
            tokens, cu_seqlens, positions, targets = masker([texts[i] for i in group], 0.3, group)
            ends = cu_seqlens[1:-1].tolist()
            labels = torch.full_like(tokens, -100).index_copy(0, positions, targets)
            inputs = features(tokens.tensor_split(ends))
            inputs["labels"] = padded(labels.tensor_split(ends), -100)
            batches.append((inputs, len(targets) / total))
        backward = partial(their_backward, lambda model, x, share: model(**x).loss * share)
        yield f"theirs, {size} texts", training_step(model, batches, backward)


def mean_loss(embeddings):
    """InfoNCE. embeddings: of the queries, then of as many documents."""
    query, document = embeddings.chunk(2)
    return contrastive.info_nce_in_blocks(query, document, 0.02) / len(query)


def pair_steps(folder, texts, budget, sizes):
    """As mlm_steps. texts: queries, then as many documents."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    def backward(model, texts):
        return contrastive.grad_cache(model, texts, mean_loss, budget)

    yield "ours", training_step(our_model(NomicBert, folder), [texts], backward)

    sides = [features(texts[: len(texts) // 2]), features(texts[len(texts) // 2 :])]
    for size in sizes:
        model = SentenceTransformer(folder, device=str(best_device())).train()
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=size)
        backward = partial(their_backward, lambda model, sides, loss=loss: loss(sides, None))
        yield f"theirs, {size} texts", training_step(model, [(sides,)], backward)


def train(folder, options, config):
    yield "step", "", "first loss", "tokens/s", "time / ours"
    tokenizer, rng = save_random_model(folder, options, config), np.random.default_rng(0)
    mix = natural_mix(options.texts, rng).clip(max=config.trained_length)
    documents = pieces_of_text(options.data, tokenizer, mix, rng)
    queries = pieces_of_text(options.data, tokenizer, rng.integers(6, 21, options.texts), rng)
    tasks = {"MLM": (mlm_steps, documents), "pairs": (pair_steps, [*queries, *documents])}
    for task, (steps_of, texts) in tasks.items():
        tokens, sizes = sum(map(len, texts)), whole_numbers(options.tries)
        steps = dict(steps_of(folder, texts, config.micro_batch_tokens, sizes))
        yield from compare(f"{task}, {tokens:,} tokens", tokens, steps, max, options.rounds)


def encode(folder, options, config):
    from sentence_transformers import SentenceTransformer

    yield "texts", "", "smallest cosine", "tokens/s", "time / ours"
    tokenizer, rng = save_random_model(folder, options, config), np.random.default_rng(0)
    ours = NomicBert.from_pretrained(folder, device=best_device())
    kwargs = {"device": str(best_device()), "model_kwargs": {"dtype": ours.dtype}}
    theirs, mix = SentenceTransformer(folder, **kwargs), natural_mix(options.texts, rng)
    total = int(mix.sum())  # the other sets have about as many tokens
    sets = {"natural mix": mix, "short": rng.integers(6, 21, max(4, total // 13))}
    sets["long"] = rng.integers(1024, 2049, max(2, total // 1536))
    for title, lengths in sets.items():
        pieces = pieces_of_text(options.data, tokenizer, lengths - 2, rng)  # [CLS] and [SEP]
        texts = [tokenizer.decode(piece.tolist()) for piece in pieces]
        tokens = sum(map(len, tokenizer.encode_batch_fast(texts)))
        works = {"ours": partial(ours.encode, texts)}
        for size in whole_numbers(options.tries):
            works[f"theirs, {size} texts"] = partial(theirs.encode, texts, batch_size=size)
        title = f"{title}: {len(texts):,} texts, {tokens:,} tokens"
        yield from compare(title, tokens, works, lambda x, y: (x * y).sum(1).min(), options.rounds)


# ------------------------------------------------------------------------------------------------
# Memory

# glibc gives freed memory back at once, and a CPU's kernels are not kept for every shape: such
# caches grow for some hundred micro-batches, and not beyond
CACHES = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}
CACHES |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "8"}


def peak_memory():
    """The most memory that this process ever had, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory_of_step(pairs, config):
    """Forward and backward of one batch of random tokens. Returns how many, and MiB."""
    shape = ModelConfig.from_options(config, ModelConfig.vocab_size, config.trained_length)
    model, rng = NomicBert(shape).to(best_device()), np.random.default_rng(0)
    model.dtype = fast_dtype(model.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # in memory at any batch size
    documents = natural_mix(pairs, rng).clip(max=config.document_tokens)
    texts = [rng.integers(5, 20_000, n) for n in (*rng.integers(6, 21, pairs), *documents)]
    before = peak_memory()
    contrastive.backward_batch(model, texts, mean_loss, config)
    return sum(map(len, texts)), peak_memory() - before


def memory(folder, options, config):
    yield "pairs", "tokens", "with GradCache, MiB", "without, MiB"
    os.environ |= CACHES
    for pairs in whole_numbers(options.batches):
        peaks = []
        for limit in (0, math.inf)[: 2 if pairs <= options.longest else 1]:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # its own peak
                changed = replace(config, tokens_in_memory=limit)
                tokens, peak = process.submit(memory_of_step, pairs, changed).result()
            peaks.append(f"{peak:,.0f}")
        yield f"{pairs:,}", f"{tokens:,}", peaks[0], *(peaks[1:] or [""])


def main(arguments):
    words, arguments = split_words(arguments)
    if words[:1] == ["stages"]:
        return print_table(*arguments, rows=stages(words[1:], arguments))
    options, _ = read_options(Options, arguments)
    commands = {"train": train, "encode": encode, "memory": memory}
    if len(words) != 1 or words[0] not in commands:
        raise InputError(f"give one of stages, {', '.join(commands)}")
    preset = [f"--preset={options.preset}"]
    config, _ = read_options(contrastive.Config, preset, contrastive.PRESETS)
    with tempfile.TemporaryDirectory() as folder:
        rows = commands[words[0]](folder, options, config)
        print_table(str(fast_dtype(best_device())), *arguments, rows=rows)


if __name__ == "__main__":
    cli(main)
