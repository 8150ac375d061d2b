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
NVLINK = 300e9  # bytes per second and direction, of an H100's 450e9: assumed
JUDGE_LAYERS, JUDGE_WEIGHTS, C = 12, 85e6, 768  # gte-base: 110 M parameters, 85 M of them in layers


@dataclass
class Options:
    gpus: int = 8  # of the second column; the first is of one GPU
    pairs: int = 470_000_000  # filter: pairs of all sources (sec. 4.2.1)
    block: int = 1_000_000  # filter: pairs that are compared with one another (sec. 4.2.1)


def saved_bytes_per_token(shape):
    """What a block keeps of a token for the backward pass, in bytes, in half precision."""

    def saved(layers, N=128):
        small = NomicBert(replace(shape, vocab_size=64, num_hidden_layers=layers))
        weights, kept = {p.untyped_storage().data_ptr() for p in small.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            small(*pack([np.zeros(N, int)]))
        return sum(storage.nbytes() for storage in kept.values()) / N

    return (saved(2) - saved(1)) / 2  # it ran in float32


def sampled_lengths(stage, config):
    """column -> lengths of its texts in tokens (n,), truncated as the run truncates them."""
    if stage == "mlm":
        return {"sequence": np.array([config.seq_len])}
    rng, lengths = np.random.default_rng(0), {"query": [], "document": []}
    if Path(config.data, "meta.json").is_file():
        folder = f"{config.data}/stage{3 if stage == 'finetune' else 2}"
        for source in open_sources(folder, load_tokenizer(config.data)):
            for name in lengths:
                sample = np.diff(source.columns[name].offsets[:10_001])
                lengths[name].extend(sample + len(source.prefixes[name]))
    else:  # log-normal
        print(f"There is no data in {config.data}: lengths are assumed.\n")
        for name, median, sigma in (("query", 15, 0.75), ("document", 70, 1.0)):
            lengths[name] = np.exp(rng.normal(math.log(median), sigma, 10_000))
    limits = {"query": config.query_tokens, "document": config.document_tokens}
    return {name: np.clip(lengths[name], 4, limits[name]) for name in lengths}


def step_of(stage, config):
    """Of one step: the model's shape, column -> number of texts, tokens, useful operations."""
    there = Path(config.data, "meta.json").is_file()
    vocab_size = load_tokenizer(config.data).get_vocab_size() if there else ModelConfig.vocab_size
    length = config.seq_len if stage == "mlm" else config.trained_length
    shape = ModelConfig.from_options(config, vocab_size, length)
    lengths, masked = sampled_lengths(stage, config), getattr(config, "mask_probability", 0.0)
    copies = {"document": 1 + getattr(config, "negatives", 0)}
    texts = {name: config.batch_size * copies.get(name, 1) for name in lengths}
    tokens = sum(texts[name] * lengths[name].mean() for name in texts)
    work = {name: training_flops(shape, lengths[name], masked) for name in texts}
    flops = sum(texts[name] / len(lengths[name]) * work[name] for name in texts)
    return shape, texts, tokens, flops


def stage_column(config, saved, world, shape, texts, tokens, flops):
    """The cells of the table for `world` GPUs: title -> text. saved: bytes per token of a block."""
    is_mlm, several = "sequence" in texts, world > 1
    with torch.device("meta"):
        model = (NomicBertForMaskedLM if is_mlm else NomicBert)(shape)
    weights = sum(p.numel() for p in model.parameters())
    cached = not is_mlm and tokens / world > config.tokens_in_memory
    at_once = config.micro_batch_tokens if is_mlm or cached else config.tokens_in_memory
    kept = shape.num_hidden_layers * saved * min(tokens / world, at_once)
    memory = {"weights": 4 * weights, "gradients": 4 * weights, "AdamW's moments": 8 * weights}
    memory["gradients as one message"] = 4 * weights * several
    memory["activations that blocks keep, weights in bf16"] = kept + 2 * weights
    gathered = 0
    if is_mlm:
        memory["logits of a chunk, and their gradients"] = (1 << 25) * (2 + 4 + 4 + 2)
    else:
        rows = sum(texts.values()) / world + texts["document"]  # own texts, and all documents
        memory["embeddings and their gradients"] = 8 * rows * shape.hidden_size
        logits = min(1 << 23, texts["query"] / world * texts["document"])
        memory["logits of a block, and their gradients"] = 12 * logits
        gathered = 4 * texts["document"] * shape.hidden_size * several
    memory["all"] = sum(memory.values())
    sent = 2 * (4 * weights * several + gathered)  # a sum goes there and back
    return {
        "parameters": f"{weights:,}",
        "tokens, a step": f"{tokens:,.0f}",
        f"tokens, {config.steps:,} steps": f"{config.steps * tokens:.2e}",
        "operations, a step": f"{flops:.2e}",
        f"operations, {config.steps:,} steps": f"{config.steps * flops:.2e}",
        **{f"memory: {name}, MiB": f"{size / 2**20:,.0f}" for name, size in memory.items()},
        "messages: gradients, MiB": f"{4 * weights * several / 2**20:,.0f}",
        "messages: embeddings, MiB": f"{gathered / 2**20:,.0f}",
        "messages: ms over NVLink, with nothing else meanwhile": f"{sent / NVLINK * 1e3:,.1f}",
        **hours(config.steps * flops * (4 / 3 if cached else 1), world),
    }


def filter_column(options, lengths, world):
    """Each text passes the judge once; each query is compared with all documents of its block."""
    tokens = sum(values.mean() for values in lengths)
    squares = sum((values**2).mean() for values in lengths)
    embed = options.pairs * (2 * JUDGE_WEIGHTS * tokens + 4 * JUDGE_LAYERS * C * squares)
    compare = options.pairs * 2 * options.block * C
    return {
        "tokens, a pair": f"{tokens:,.0f}",
        f"tokens, {options.pairs:,} pairs": f"{options.pairs * tokens:.2e}",
        "operations to embed them": f"{embed:.2e}",
        f"operations to compare them in blocks of {options.block:,}": f"{compare:.2e}",
        **hours(embed + compare, world),
    }


def hours(flops, world):
    seconds = {
        gpu: flops / (world * SHARE * PEAK_FLOPS[gpu]) for gpu in ("H100", "A100", "RTX 4090")
    }
    return {
        f"hours, {g} at {SHARE:.0%} of its peak": f"{s / 3600:,.1f}" for g, s in seconds.items()
    }


def main(arguments):
    words, arguments = split_words(arguments)
    own, others = split_options(Options, arguments)
    options, _ = read_options(Options, own)
    if len(words) != 1 or words[0] not in (*STAGES, "filter"):
        raise InputError(f"give one of {', '.join(STAGES)}, filter")
    name, worlds = words[0], (1, options.gpus)
    stage, paper = STAGES.get(name, STAGES["contrastive"]), ["--preset=paper"] * (name == "filter")
    config, _ = read_options(stage.Config, [*paper, *others], stage.PRESETS)
    if name == "filter":
        lengths = sampled_lengths(name, config).values()
        columns = [filter_column(options, lengths, world) for world in worlds]
    else:
        step = step_of(name, config)
        saved = saved_bytes_per_token(step[0])
        columns = [stage_column(config, saved, world, *step) for world in worlds]
    print_head(f"{name}, preset {config.preset}", "1 GPU", f"{options.gpus} GPUs")
    for title in columns[0]:
        print_row(title, *(cells[title] for cells in columns))


if __name__ == "__main__":
    cli(main)
