"""What a run takes: tokens, operations, memory, messages, hours. Prints it in seconds.

    python bench/estimate.py mlm --preset=paper
    python bench/estimate.py contrastive --preset=paper --gpus=16 --batch-size=65536
    python bench/estimate.py finetune --gpus=1

Any option of the stage may be given. Lengths of pairs are assumed, those of web text; so is the
paper's vocabulary, except for the preset laptop. Operations are the useful ones (common/device.py).
Hours include GradCache's second forward pass, a third more, and no time for messages.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.speed import STAGES
from common.device import PEAK_FLOPS, training_flops
from common.options import InputError, cli, read_options, split_words
from model import ModelConfig, NomicBert, NomicBertForMaskedLM

SPEEDS = {  # operations/s; an H100 reached 45% of its peak in stage 1, 38% in 2 (docs/speed.md)
    f"{name} at 40% of its peak": 0.4 * PEAK_FLOPS[name] for name in ("H100", "A100", "RTX 4090")
}
SPEEDS["two CPU cores at 0.3 TFLOP/s"] = 0.3e12  # as in `encode` (docs/speed.md), 12 layers of 768


@dataclass
class Options:
    gpus: int = 8  # or CPUs, that share each batch


def saved_bytes_per_token(shape):
    """Bytes of a token that a block keeps for the backward pass, in half precision."""
    # x; q, k and v; q and k after rotation; the result of attention twice; two sums; norm1(x)
    numbers = 11 * shape.hidden_size
    numbers += 4 * shape.intermediate_size  # fc11, fc12, silu of it, their product
    return 2 * (numbers + shape.num_attention_heads + 4)  # sums of softmax, two norms


def lengths_of(stage, config):
    """column -> lengths of 10,000 of its texts in tokens, truncated as the run truncates them."""
    if stage == "mlm":
        return {"sequence": np.array([config.seq_len])}
    rng, lengths = np.random.default_rng(0), {}
    for name, median, sigma in (("query", 15, 0.75), ("document", 70, 1.0)):
        sample = np.exp(rng.normal(math.log(median), sigma, 10_000))  # log-normal
        lengths[name] = sample.clip(4, getattr(config, f"{name}_tokens"))
    return lengths


def step_of(stage, config):
    """Of one step: the model's shape, column -> number of texts, tokens, useful operations."""
    vocab_size = 8192 if config.preset == "laptop" else ModelConfig.vocab_size
    length = config.seq_len if stage == "mlm" else config.trained_length
    shape = ModelConfig.from_options(config, vocab_size, length)
    masked, negatives = getattr(config, "mask_probability", 0.0), getattr(config, "negatives", 0)
    texts, tokens, flops = {}, 0, 0
    for name, lengths in lengths_of(stage, config).items():
        texts[name] = config.batch_size * (1 + negatives * (name == "document"))
        tokens += texts[name] * lengths.mean()
        flops += texts[name] / len(lengths) * training_flops(shape, lengths, masked)
    return shape, texts, tokens, flops


def estimate(stage, config, gpus):
    """Yields titles and numbers."""
    shape, texts, tokens, flops = step_of(stage, config)
    with torch.device("meta"):
        network = (NomicBertForMaskedLM if stage == "mlm" else NomicBert)(shape)
    weights, steps = sum(p.numel() for p in network.parameters()), config.steps
    yield "parameters", weights
    yield "tokens, a step", tokens
    yield f"tokens, {steps:,} steps", steps * tokens
    yield "operations, a step", flops
    yield f"operations, {steps:,} steps", steps * flops

    at_once, message = tokens / gpus, 4 * weights * (gpus > 1)
    cached = at_once > getattr(config, "tokens_in_memory", math.inf)  # GradCache
    if cached or stage == "mlm":
        at_once = min(at_once, config.micro_batch_tokens)
    kept = shape.num_hidden_layers * saved_bytes_per_token(shape) * at_once
    memory = {
        "weights, gradients, their message, AdamW's moments": 16 * weights + message,
        "activations that blocks keep, weights in bf16": kept + 2 * weights,
    }
    messages = {"gradients": message}
    if stage == "mlm":
        memory["logits of a chunk, and their gradients"] = (1 << 25) * 12
    else:
        embeddings = sum(texts.values()) / gpus + texts["document"]  # own, and all documents
        logits = min(1 << 23, texts["query"] / gpus * texts["document"])
        sizes = 8 * embeddings * shape.hidden_size + 12 * logits
        memory["embeddings, logits of a block, and their gradients"] = sizes
        messages["embeddings"] = 4 * texts["document"] * shape.hidden_size * (gpus > 1)
    memory["all"] = sum(memory.values())
    for title, sizes in (("memory", memory), ("messages", messages)):
        for name, size in sizes.items():
            yield f"{title}: {name}, MiB", size / 2**20
    for name, speed in SPEEDS.items():
        hours = steps * flops * (4 / 3 if cached else 1) / (gpus * speed) / 3600
        yield (f"hours, {name}", hours) if hours >= 1 else (f"minutes, {name}", hours * 60)


def main(arguments):
    words, arguments = split_words(arguments)
    own = [a for a in arguments if a.startswith("--gpus") or not words]
    options, _ = read_options(Options, own)
    if len(words) != 1 or words[0] not in STAGES:
        raise InputError(f"give one of {', '.join(STAGES)}")
    stage, others = STAGES[words[0]], [a for a in arguments if a not in own]
    config, _ = read_options(stage.Config, others, stage.PRESETS)
    print(f"| {words[0]}, preset {config.preset} | on {options.gpus} |\n|---|---:|")
    for title, number in estimate(words[0], config, options.gpus):
        digits = 1 if title.startswith(("hours", "minutes")) else 0
        print("|", title, "|", f"{number:,.{digits}f}" if number < 1e9 else f"{number:.2e}", "|")


if __name__ == "__main__":
    cli(main)
