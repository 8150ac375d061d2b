"""What a run takes: tokens, operations, memory, messages, hours. Prints it in seconds.

    python bench/estimate.py mlm --preset=paper
    python bench/estimate.py contrastive --preset=paper --gpus=16 --batch-size=65536
    python bench/estimate.py finetune --data=out/pydocs

Any option of the stage may be given. Without the data in --data, lengths of texts are assumed.
Operations are the useful ones (model.training_flops); hours include GradCache's second forward
pass, a third more.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
from bench.shared import print_head, print_row, split_options
from bench.stages import STAGES
from common.device import PEAK_FLOPS
from common.files import load_tokenizer
from common.options import InputError, cli, read_options, split_words
from data.store import open_sources

SHARE = 0.4  # of the data sheet's peak; an H100 reached .45 in stage 1, .38 in 2 (docs/speed.md)


@dataclass
class Options:
    gpus: int = 8  # of the second column; the first is of one GPU


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
    vocab_size = model.ModelConfig.vocab_size
    if Path(config.data, "meta.json").is_file():
        vocab_size = load_tokenizer(config.data).get_vocab_size()
    length = config.seq_len if stage == "mlm" else config.trained_length
    shape = model.ModelConfig.from_options(config, vocab_size, length)
    masked, negatives = getattr(config, "mask_probability", 0.0), getattr(config, "negatives", 0)
    texts, tokens, flops = {}, 0, 0
    for name, lengths in sampled_lengths(stage, config).items():
        texts[name] = config.batch_size * (1 + negatives * (name == "document"))
        tokens += texts[name] * lengths.mean()
        flops += texts[name] / len(lengths) * model.training_flops(shape, lengths, masked)
    return shape, texts, tokens, flops


def estimate(stage, config, worlds):
    """worlds (2,): the GPUs of each column. Returns title -> one or two numbers, and the operations
    of the whole run (2,)."""
    shape, texts, tokens, flops = step_of(stage, config)
    with torch.device("meta"):
        network = (model.NomicBertForMaskedLM if stage == "mlm" else model.NomicBert)(shape)
    weights, steps = sum(p.numel() for p in network.parameters()), config.steps
    in_memory = getattr(config, "tokens_in_memory", 0)  # stage 1 always has micro-batches
    split = tokens / worlds > in_memory
    at_once = np.minimum(tokens / worlds, np.where(split, config.micro_batch_tokens, in_memory))
    kept = shape.num_hidden_layers * saved_bytes_per_token(shape) * at_once
    message, gathered = 4 * weights * (worlds > 1), 0
    memory = {"weights": 4 * weights, "gradients": 4 * weights, "AdamW's moments": 8 * weights}
    memory["gradients as one message"] = message
    memory["activations that blocks keep, weights in bf16"] = kept + 2 * weights
    if stage == "mlm":
        memory["logits of a chunk, and their gradients"] = (1 << 25) * (2 + 4 + 4 + 2)
    else:
        embeddings = sum(texts.values()) / worlds + texts["document"]  # own, and all documents
        memory["embeddings and their gradients"] = 8 * embeddings * shape.hidden_size
        logits = np.minimum(1 << 23, texts["query"] / worlds * texts["document"])
        memory["logits of a block, and their gradients"] = 12 * logits
        gathered = 4 * texts["document"] * shape.hidden_size * (worlds > 1)
    memory["all"] = sum(memory.values())
    rows = {"parameters": weights, "tokens, a step": tokens}
    rows[f"tokens, {steps:,} steps"] = steps * tokens
    rows |= {"operations, a step": flops, f"operations, {steps:,} steps": steps * flops}
    rows |= {f"memory: {name}, MiB": size / 2**20 for name, size in memory.items()}
    messages = {"gradients": message, "embeddings": gathered}
    rows |= {f"messages: {name}, MiB": size / 2**20 for name, size in messages.items()}
    return rows, steps * flops * np.where(split & (stage != "mlm"), 4 / 3, 1)


def main(arguments):
    words, arguments = split_words(arguments)
    own, others = split_options(Options, arguments)
    options, _ = read_options(Options, own)
    if len(words) != 1 or words[0] not in STAGES:
        raise InputError(f"give one of {', '.join(STAGES)}")
    (name,), worlds = words, np.array([1, options.gpus])
    config, _ = read_options(STAGES[name].Config, others, STAGES[name].PRESETS)
    print_head(f"{name}, preset {config.preset}", "1 GPU", f"{options.gpus} GPUs")
    rows, flops = estimate(name, config, worlds)
    for title, values in rows.items():
        values = np.broadcast_to(values, 2)
        print_row(title, *(f"{n:,.0f}" if n < 1e9 else f"{n:.2e}" for n in values))
    for gpu in ("H100", "A100", "RTX 4090"):
        hours = flops / (worlds * SHARE * PEAK_FLOPS[gpu]) / 3600
        print_row(f"hours, {gpu} at {SHARE:.0%} of its peak", *(f"{n:,.1f}" for n in hours))
    if not Path(config.data, "meta.json").is_file():
        print(f"\nThere is no data in {config.data}: vocabulary and lengths of pairs are assumed.")


if __name__ == "__main__":
    cli(main)
