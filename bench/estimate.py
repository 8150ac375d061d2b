"""What a run takes, before it begins: tokens, operations, memory, messages, hours. In seconds.

    python bench/estimate.py mlm --preset=paper
    python bench/estimate.py contrastive --preset=paper --gpus=16 --batch-size=65536
    python bench/estimate.py finetune --data=out/pydocs
    python bench/estimate.py filter        # consistency filtering of the paper's pairs

Any option of the stage may be given. Lengths are those of the texts in --data, where it is there;
else they are assumed. Operations are the useful ones (model.training_flops); GradCache's first
forward pass, a third more, is in the hours. What blocks keep for the backward pass is not a
formula: a small model runs, and the tensors that it saves are added up.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row, split_options
from bench.stages import STAGES
from common.device import PEAK_FLOPS
from common.files import load_tokenizer
from common.options import InputError, cli, read_options, split_words
from data.store import open_sources, pack
from model import ModelConfig, NomicBert, NomicBertForMaskedLM, training_flops

SHARE = 0.4  # of the peak of the data sheet: what good training code reaches
PAIRS, BLOCK = 470_000_000, 1_000_000  # to filter; compared with one another (sec. 4.2.1)
LAYERS, SIZE, WEIGHTS = 12, 768, 85e6  # of the judge, gte-base: weights of its layers, of 110 M


@dataclass
class Options:
    gpus: int = 8  # of the second column; the first is of one GPU


def saved_bytes_per_token(shape, N=128):
    """What a block keeps of a token for the backward pass, in bytes, in half precision."""
    saved = []
    for layers in (1, 2):
        small = NomicBert(replace(shape, vocab_size=64, num_hidden_layers=layers))
        weights, kept = {p.data_ptr() for p in small.parameters()}, {}

        def keep(tensor, weights=weights, kept=kept):
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            small(*pack([np.zeros(N, int)]))
        saved.append(sum(storage.nbytes() for storage in kept.values()) / N)
    return (saved[1] - saved[0]) / 2  # it ran in float32


def sampled_lengths(stage, config):
    """column -> lengths of its texts in tokens (n,), truncated as the run truncates them."""
    if stage == "mlm":
        return {"sequence": np.array([config.seq_len])}
    rng, lengths = np.random.default_rng(0), {}
    for name, median, sigma in (("query", 15, 0.75), ("document", 70, 1.0)):
        if Path(config.data, "meta.json").is_file():
            folder = f"{config.data}/stage{3 if stage == 'finetune' else 2}"
            found = [
                np.diff(source.columns[name].offsets[:10_001]) + len(source.prefixes[name])
                for source in open_sources(folder, load_tokenizer(config.data))
            ]
        else:
            found = [np.exp(rng.normal(math.log(median), sigma, 10_000))]  # log-normal
        lengths[name] = np.clip(np.concatenate(found), 4, getattr(config, f"{name}_tokens"))
    return lengths


def step_of(stage, config):
    """Of one step: the model's shape, column -> number of texts, tokens, useful operations."""
    there = Path(config.data, "meta.json").is_file()
    vocab_size = load_tokenizer(config.data).get_vocab_size() if there else ModelConfig.vocab_size
    length = config.seq_len if stage == "mlm" else config.trained_length
    shape = ModelConfig.from_options(config, vocab_size, length)
    masked, negatives = getattr(config, "mask_probability", 0.0), getattr(config, "negatives", 0)
    texts, tokens, flops = {}, 0, 0
    for name, lengths in sampled_lengths(stage, config).items():
        texts[name] = config.batch_size * (1 + negatives * (name == "document"))
        tokens += texts[name] * lengths.mean()
        flops += texts[name] / len(lengths) * training_flops(shape, lengths, masked)
    return shape, texts, tokens, flops


def print_rows(form, rows):
    """rows: title -> a number, or one for each of the two columns."""
    for title, values in rows.items():
        print_row(title, *(f"{value:{form}}" for value in np.broadcast_to(values, 2)))


def print_stage(stage, config, worlds):
    """worlds (2,): the GPUs of each column. Returns the operations of the whole run (2,)."""
    shape, texts, tokens, flops = step_of(stage, config)
    with torch.device("meta"):
        model = (NomicBertForMaskedLM if stage == "mlm" else NomicBert)(shape)
    weights = sum(p.numel() for p in model.parameters())
    message, gathered = 4 * weights * (worlds > 1), 0
    in_memory = getattr(config, "tokens_in_memory", 0)  # stage 1 always has micro-batches
    split = tokens / worlds > in_memory
    at_once = np.minimum(tokens / worlds, np.where(split, config.micro_batch_tokens, in_memory))
    kept = shape.num_hidden_layers * saved_bytes_per_token(shape) * at_once
    memory = {"weights": 4 * weights, "gradients": 4 * weights, "AdamW's moments": 8 * weights}
    memory["gradients as one message"] = message
    memory["activations that blocks keep, weights in bf16"] = kept + 2 * weights
    if stage == "mlm":
        memory["logits of a chunk, and their gradients"] = (1 << 25) * (2 + 4 + 4 + 2)
    else:
        rows = sum(texts.values()) / worlds + texts["document"]  # own texts, and all documents
        memory["embeddings and their gradients"] = 8 * rows * shape.hidden_size
        logits = np.minimum(1 << 23, texts["query"] / worlds * texts["document"])
        memory["logits of a block, and their gradients"] = 12 * logits
        gathered = 4 * texts["document"] * shape.hidden_size * (worlds > 1)
    memory["all"] = sum(memory.values())
    steps = config.steps
    print_rows(",.0f", {"parameters": weights, "tokens, a step": tokens})
    print_rows(".2e", {f"tokens, {steps:,} steps": steps * tokens, "operations, a step": flops})
    print_rows(".2e", {f"operations, {steps:,} steps": steps * flops})
    print_rows(",.0f", {f"memory: {name}, MiB": n / 2**20 for name, n in memory.items()})
    messages = {"gradients": message, "embeddings": gathered}
    print_rows(",.0f", {f"messages: {name}, MiB": n / 2**20 for name, n in messages.items()})
    return steps * flops * np.where(split & (stage != "mlm"), 4 / 3, 1)


def print_filter(config):
    """Each text passes the judge once; each query is compared with all documents of its block."""
    lengths = sampled_lengths("filter", config).values()
    tokens = sum(values.mean() for values in lengths)
    squares = sum((values**2).mean() for values in lengths)
    embed = PAIRS * (2 * WEIGHTS * tokens + 4 * LAYERS * SIZE * squares)
    compare = PAIRS * 2 * BLOCK * SIZE
    print_rows(",.0f", {"tokens, a pair": tokens})
    print_rows(".2e", {f"tokens, {PAIRS:,} pairs": PAIRS * tokens})
    print_rows(".2e", {"operations to embed them": embed})
    print_rows(".2e", {f"operations to compare them in blocks of {BLOCK:,}": compare})
    return embed + compare


def main(arguments):
    words, arguments = split_words(arguments)
    own, others = split_options(Options, arguments)
    options, _ = read_options(Options, own)
    if len(words) != 1 or words[0] not in (*STAGES, "filter"):
        raise InputError(f"give one of {', '.join(STAGES)}, filter")
    name, worlds = words[0], np.array([1, options.gpus])
    stage, paper = STAGES.get(name, STAGES["contrastive"]), ["--preset=paper"] * (name == "filter")
    config, _ = read_options(stage.Config, [*paper, *others], stage.PRESETS)
    print_head(f"{name}, preset {config.preset}", "1 GPU", f"{options.gpus} GPUs")
    flops = print_filter(config) if name == "filter" else print_stage(name, config, worlds)
    for gpu in ("H100", "A100", "RTX 4090"):
        hours = flops / (worlds * SHARE * PEAK_FLOPS[gpu]) / 3600
        print_rows(",.1f", {f"hours, {gpu} at {SHARE:.0%} of its peak": hours})
    if not Path(config.data, "meta.json").is_file():
        print(f"\nThere is no data in {config.data}: vocabulary and lengths of pairs are assumed.")


if __name__ == "__main__":
    cli(main)
