"""Speed: the stages themselves; training steps and `encode` beside sentence-transformers.

    python bench/speed.py stages                        # tokens/s, share of the matrix rate
    python bench/speed.py stages mlm --preset=gpu       # some stages, with any options of theirs
    python bench/speed.py train                         # training steps of stage 2
    python bench/speed.py encode --preset=paper         # embeddings of texts

stages: the median of 12 steps (--steps), without the first two. Operations are the useful ones
(common/device.py). The matrix rate is that of one layer's products in the same type.

train, encode: sentence-transformers has the same weights and texts, half precision where it is
fast, and texts sorted by length; its fastest batch size of --tries is what counts. A training step
is forward, backward and AdamW on tokenized texts. Padding does not count as tokens. The first loss,
or the smallest cosine with our embeddings, shows that both compute the same.
"""

import contextlib
import math
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
import finetune
import mlm
from common import run
from common.device import best_device, choose_dtype, device_name, fast_dtype
from common.files import load_tokenizer, read_json_lines
from common.options import InputError, cli, read_options, split_words
from data.store import Source
from model import ModelConfig, NomicBert

STAGES = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}


@dataclass
class Options:
    preset: str = "laptop"  # of contrastive.py: the model, its micro-batches and longest texts
    data: str = "out/pydocs"  # a data folder; texts are pieces of its training text
    texts: int = 256  # how many of the natural mix [8, 1e6]
    tries: str = "8,32"  # batch sizes of sentence-transformers, in texts
    rounds: int = 3  # how often each is timed; the median counts


def whole_numbers(option, text, least=1):
    """The numbers of an option: "8,32" -> [8, 32]. Raises InputError for anything else."""
    valid = re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII)
    numbers = [int(number) for number in text.split(",")] if valid else []
    if not numbers or min(numbers) < least:
        raise InputError(f"{option}={text}: give whole numbers from {least} with commas between")
    return numbers


def print_table(*about, rows):
    """Prints the machine and `about` in a line, then a table of which the first row is the head."""
    machine = f"torch {torch.__version__}", device_name(best_device())
    print("", ", ".join([*machine, *about]), "", sep="\n", flush=True)
    for number, cells in enumerate(rows):
        print(f"| {' | '.join(cells)} |", flush=True)
        if number == 0:
            print("|---" + "|---:" * (len(cells) - 1) + "|")


# ------------------------------------------------------------------------------------------------
# The stages


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
    names, device, memory = names or list(STAGES), best_device(), ""
    if unknown := set(names) - set(STAGES):
        raise InputError(f"{', '.join(unknown)}: the stages are {', '.join(STAGES)}")
    configs = [read_options(STAGES[n].Config, arguments, STAGES[n].PRESETS)[0] for n in names]
    titles = "stage", "tokens/s", "MFLOP/token", "TFLOP/s", "matrix rate, TFLOP/s", "share"
    yield *titles, "GPU memory, GiB"
    for name, config in zip(names, configs, strict=True):
        rate = matrix_rate(config, device)
        run.peak_flops = lambda device, rate=rate: rate  # so that the log has the share of it
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            quiet = ["--log-every=1", "--eval-every=0", "--save-every=1e9", f"--out={folder}/run"]
            STAGES[name].main(["--steps=12", *arguments, *quiet])
            log = [record for _, record in read_json_lines(f"{folder}/run/log.jsonl")]
        if device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        steps = [(record["tokens_per_second"], record["share_of_peak"]) for record in log]
        speed, share = np.median(steps[2:] or steps, axis=0)
        flops, rate = share * rate, max(rate, matrix_rate(config, device))  # a CPU's speed varies
        cells = f"{speed:,.0f}", f"{flops / speed / 1e6:.1f}", f"{flops / 1e12:.3f}"
        yield name, *cells, f"{rate / 1e12:.3f}", f"{flops / rate:.0%}", memory


# ------------------------------------------------------------------------------------------------
# Beside sentence-transformers


def save_random_model(folder, options, config):
    """The checkpoint that both sides open. Returns its tokenizer."""
    tokenizer = load_tokenizer(options.data)
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    model = NomicBert(ModelConfig.from_options(config, size, config.trained_length))
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return tokenizer


def natural_mix(n, rng):
    """Lengths of n texts in tokens, log-normal as those of web texts: median 70, up to 2,048."""
    return np.exp(rng.normal(math.log(70), 1.0, n)).clip(8, 2048).astype(int)


def pieces_of_text(data, tokenizer, lengths, rng):
    """Pieces of a data folder's training text, with these lengths: a list of id arrays."""
    ids = Source(f"{data}/stage1/train", tokenizer).columns["document"].tokens
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


def training_step(model, backward):
    """A function that calls backward(model), which returns a loss, and then AdamW's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        loss = backward(model)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)  # waits for a GPU

    return step


def mean_loss(embeddings):
    """InfoNCE. embeddings: of the queries, then of as many documents."""
    query, document = embeddings.chunk(2)
    return contrastive.info_nce_in_blocks(query, document, 0.02) / len(query)


def our_step(folder, texts, budget):
    """A training step through GradCache. texts: queries, then as many documents."""
    model = NomicBert.from_pretrained(folder, device=best_device())
    if best_device().type == "cuda":
        model.compile_blocks()
    return training_step(model, lambda m: contrastive.grad_cache(m, texts, mean_loss, budget))


def their_step(folder, texts, size):
    """The same by sentence-transformers, with `size` texts at once."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    device, dtype, sides = best_device(), fast_dtype(best_device()), []
    for side in (texts[: len(texts) // 2], texts[len(texts) // 2 :]):
        tokens = pad_sequence(list(map(torch.as_tensor, side)), batch_first=True).to(device)
        sides.append({"input_ids": tokens, "attention_mask": (tokens != 0).long()})  # 0 is [PAD]
    model = SentenceTransformer(folder, device=str(device)).train()
    loss_of = losses.CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=size)

    def backward(model):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(sides, None)
            loss.backward()  # in autocast, since GradCache has a forward pass in it
        return loss.detach()

    return training_step(model, backward)


def train(folder, options, config):
    yield "step", "", "first loss", "tokens/s", "time / ours"
    tokenizer, rng = save_random_model(folder, options, config), np.random.default_rng(0)
    mix = natural_mix(options.texts, rng).clip(max=config.trained_length)
    documents = pieces_of_text(options.data, tokenizer, mix, rng)
    queries = pieces_of_text(options.data, tokenizer, rng.integers(6, 21, options.texts), rng)
    texts = [*queries, *documents]
    tokens = sum(map(len, texts))
    steps = {"ours": our_step(folder, texts, config.micro_batch_tokens)}
    for size in whole_numbers("--tries", options.tries):
        steps[f"theirs, {size} texts"] = their_step(folder, texts, size)
    title = f"{options.texts:,} pairs, {tokens:,} tokens"
    yield from compare(title, tokens, steps, max, options.rounds)


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
        for size in whole_numbers("--tries", options.tries):
            works[f"theirs, {size} texts"] = partial(theirs.encode, texts, batch_size=size)
        title = f"{title}: {len(texts):,} texts, {tokens:,} tokens"
        yield from compare(title, tokens, works, lambda x, y: (x * y).sum(1).min(), options.rounds)


def main(arguments):
    words, arguments = split_words(arguments)
    if words[:1] == ["stages"]:
        return print_table(*arguments, rows=stages(words[1:], arguments))
    options, _ = read_options(Options, arguments)
    commands = {"train": train, "encode": encode}
    if len(words) != 1 or words[0] not in commands:
        raise InputError(f"give one of stages, {', '.join(commands)}")
    preset = [f"--preset={options.preset}"]
    config, _ = read_options(contrastive.Config, preset, contrastive.PRESETS)
    with tempfile.TemporaryDirectory() as folder:
        rows = commands[words[0]](folder, options, config)
        print_table(str(fast_dtype(best_device())), *arguments, rows=rows)


if __name__ == "__main__":
    cli(main)
