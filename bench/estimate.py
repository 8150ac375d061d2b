"""What a run takes: tokens, operations, memory, messages, hours. Prints it in seconds.

    python bench/estimate.py mlm --preset=paper
    python bench/estimate.py contrastive --preset=paper --gpus=16 --batch-size=65536
    python bench/estimate.py finetune --data=out/pydocs --gpus=1

Any option of the stage may be given. Without the data in --data, lengths of texts are assumed.
Operations are the useful ones (common/device.py). Hours include GradCache's second forward pass, a
third more, and no time for messages.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row, split_options
from bench.stages import STAGES
from common.device import PEAK_FLOPS, training_flops
from common.files import load_tokenizer
from common.options import InputError, cli, read_options, split_words
from data.store import open_sources
from model import ModelConfig, NomicBert, NomicBertForMaskedLM

SHARE = 0.4  # of the data sheet's peak; an H100 reached .45 in stage 1, .38 in 2 (docs/speed.md)


@dataclass
class Options:
    gpus: int = 8  # that share each batch


def saved_bytes_per_token(shape):
    """Bytes of a token that a block keeps for the backward pass, in half precision."""
    # x; q, k and v; q and k after rotation; the result of attention twice; two sums; norm1(x)
    numbers = 11 * shape.hidden_size
    numbers += 4 * shape.intermediate_size  # fc11, fc12, silu of it, their product
    return 2 * (numbers + shape.num_attention_heads + 4)  # sums of softmax, two norms


def sampled_lengths(stage, config):
    """column -> lengths of its texts in tokens (n,), truncated as the run truncates them."""
    if stage == "mlm":
        return {"sequence": np.array([config.seq_len])}
    rng, lengths, sources = np.random.default_rng(0), {}, []
    if Path(config.data, "meta.json").is_file():
        folder = f"{config.data}/stage{3 if stage == 'finetune' else 2}"
        sources = open_sources(folder, load_tokenizer(config.data))
    for name, median, sigma in (("query", 15, 0.75), ("document", 70, 1.0)):
        found = [
            np.diff(source.columns[name].offsets[:10_001]) + len(source.prefixes[name])
            for source in sources
        ]
        found = found or [np.exp(rng.normal(math.log(median), sigma, 10_000))]  # log-normal
        lengths[name] = np.clip(np.concatenate(found), 4, getattr(config, f"{name}_tokens"))
    return lengths


def step_of(stage, config):
    """Of one step: the model's shape, column -> number of texts, tokens, useful operations."""
    vocab_size = ModelConfig.vocab_size
    if Path(config.data, "meta.json").is_file():
        vocab_size = load_tokenizer(config.data).get_vocab_size()
    length = config.seq_len if stage == "mlm" else config.trained_length
    shape = ModelConfig.from_options(config, vocab_size, length)
    masked, negatives = getattr(config, "mask_probability", 0.0), getattr(config, "negatives", 0)
    texts, tokens, flops = {}, 0, 0
    for name, lengths in sampled_lengths(stage, config).items():
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
    if stage == "mlm":
        memory["logits of a chunk, and their gradients"] = (1 << 25) * 12
    else:
        embeddings = sum(texts.values()) / gpus + texts["document"]  # own, and all documents
        logits = min(1 << 23, texts["query"] / gpus * texts["document"])
        sizes = 8 * embeddings * shape.hidden_size + 12 * logits
        memory["embeddings, logits of a block, and their gradients"] = sizes
    memory["all"] = sum(memory.values())
    for name, size in memory.items():
        yield f"memory: {name}, MiB", size / 2**20
    yield "messages: gradients, MiB", message / 2**20
    if stage != "mlm":
        gathered = 4 * texts["document"] * shape.hidden_size * (gpus > 1)
        yield "messages: embeddings, MiB", gathered / 2**20
    for name in ("H100", "A100", "RTX 4090"):
        speed = gpus * SHARE * PEAK_FLOPS[name]
        hours = steps * flops * (4 / 3 if cached else 1) / speed / 3600
        yield f"hours, {name} at {SHARE:.0%} of its peak", hours


def main(arguments):
    words, arguments = split_words(arguments)
    own, others = split_options(Options, arguments)
    options, _ = read_options(Options, own)
    if len(words) != 1 or words[0] not in STAGES:
        raise InputError(f"give one of {', '.join(STAGES)}")
    stage = STAGES[words[0]]
    config, _ = read_options(stage.Config, others, stage.PRESETS)
    print_head(f"{words[0]}, preset {config.preset}", f"{options.gpus} GPUs")
    for title, number in estimate(words[0], config, options.gpus):
        digits = 1 if title.startswith("hours") else 0
        print_row(title, f"{number:,.{digits}f}" if number < 1e9 else f"{number:.2e}")
    if not Path(config.data, "meta.json").is_file():
        print(f"\nThere is no data in {config.data}: vocabulary and lengths of pairs are assumed.")


if __name__ == "__main__":
    cli(main)
