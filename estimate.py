"""What a run takes, counted before it is begun: operations, memory, messages, hours.

    python mlm.py --preset=paper --dry-run          # and so contrastive.py and finetune.py

Operations. To train on a token takes 6 for each weight of a matrix that it passes (a multiplication
and an addition forward, twice that backward), and 12 C L in each layer for attention among L
tokens; in stage 1 the head, for the masked tokens. GradCache's first forward pass comes on top: a
third more work, which is not counted as useful.

Memory. Of each part of the run in one process. What blocks keep for the backward pass is not a
formula here: a small model is run, and what it saved is added up.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import model
from common import model_shape
from data import store

# operations per second of bf16 products, dense: NVIDIA's data sheets. The first name that fits
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
PEAKS |= {"L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
SHARE = 0.4  # of it, in --dry-run's hours: what well-made training code reaches
SHOWN = ("H100", "A100", "RTX 4090")
NVLINK = 300e9  # bytes per second and direction, of the 450e9 of an H100: an assumption


def operations_per_token(config, lengths, masked_share=0.0):
    """Useful operations of training on a token, in the mean over texts of these lengths (B,).

    config: the model's. masked_share: of tokens that pass the MLM head."""
    C, inner, lengths = config.hidden_size, config.intermediate_size, np.asarray(lengths, float)
    others = (lengths**2).sum() / lengths.sum()  # how many tokens a token attends to
    layer = 6 * (4 * C * C + 3 * C * inner) + 12 * C * others
    return config.num_hidden_layers * layer + masked_share * 6 * (C * C + C * config.vocab_size)


def speed(config, lengths, tokens, seconds, device, world=1, masked_share=0.0):
    """For the log: tokens per second, and the share of the peak of all GPUs where it is known."""
    record = {"tokens_per_second": tokens / seconds}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((PEAKS[known] for known in PEAKS if known in name), None)
    if peak:
        operations = tokens * operations_per_token(config, lengths, masked_share)
        record["share_of_peak"] = operations / seconds / (world * peak)
    return record


def saved_bytes_per_token(config):
    """What a block keeps of a token for the backward pass, in bytes, in half precision."""

    def saved(layers, N=128):
        small = model.NomicBert(replace(config, vocab_size=64, num_hidden_layers=layers))
        weights = {p.untyped_storage().data_ptr() for p in small.parameters()}
        sizes = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = (storage, storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            small(*store.pack([np.zeros(N, int)]))
        return sum(size for _, size in sizes.values()) / N

    return (saved(2) - saved(1)) / 2  # it computed in float32


def sampled_lengths(stage, config, tokenizer):
    """column -> lengths of its texts, cut as the run cuts them: a sample; and where it is from."""
    if stage == "mlm":
        return {"sequence": np.array([config.seq_len])}, "every sequence is full"
    limits = {"query": config.query_tokens, "document": config.document_tokens}
    if tokenizer is None:  # log-normal, as lengths of texts are
        rng, lengths = np.random.default_rng(0), {}
        for name, median, sigma in (("query", 15, 0.75), ("document", 70, 1.0)):
            lengths[name] = np.exp(rng.normal(math.log(median), sigma, 10_000))
        origin = f"assumed, as there is no data in {config.data}"
    else:
        number = {"contrastive": 2, "finetune": 3}[stage]
        sources = store.open_sources(f"{config.data}/stage{number}", tokenizer)
        lengths = {name: [] for name in limits}
        for source in sources:
            for name, column in source.columns.items():
                if name in limits:
                    sample = np.diff(column.offsets[:10_001]) + len(source.prefixes[name])
                    lengths[name].extend(sample)
        origin = f"those of {config.data}"
    return {name: np.clip(values, 4, limits[name]) for name, values in lengths.items()}, origin


@dataclass(frozen=True)
class Step:
    """What one step of a run consists of, over all processes."""

    shape: model.Config  # of the model
    lengths: dict  # column -> lengths of its texts, a sample
    origin: str  # where these are from
    texts: dict  # column -> how many
    tokens: float
    operations: float  # useful ones


def step_of(stage, config):
    """A step of a run. stage: "mlm", "contrastive" or "finetune"; config: its Config."""
    there = Path(config.data, "meta.json").is_file()
    tokenizer = store.load_tokenizer(config.data) if there else None
    vocab_size = tokenizer.get_vocab_size() if there else model.Config.vocab_size
    trained_length = config.seq_len if stage == "mlm" else config.trained_length
    shape = model_shape(config, vocab_size, trained_length)
    lengths, origin = sampled_lengths(stage, config, tokenizer)
    masked = config.mask_probability if stage == "mlm" else 0.0
    copies = {"document": 1 + getattr(config, "negatives", 0)}
    texts = {name: config.batch_size * copies.get(name, 1) for name in lengths}
    tokens = {name: texts[name] * lengths[name].mean() for name in texts}
    work = sum(tokens[name] * operations_per_token(shape, lengths[name], masked) for name in texts)
    return Step(shape, lengths, origin, texts, float(sum(tokens.values())), float(work))


def dry_run(stage, config, processes=8):
    """Prints what a run would take on 1 and on `processes` GPUs. stage: "mlm", "contrastive" or
    "finetune". Nothing is written."""
    step, is_mlm = step_of(stage, config), stage == "mlm"
    shape, texts, in_step, work = step.shape, step.texts, step.tokens, step.operations
    with torch.device("meta"):
        built = (model.NomicBertForMaskedLM if is_mlm else model.NomicBert)(shape)
    weights = sum(p.numel() for p in built.parameters())

    means = ", ".join(f"{n.mean():,.0f} tokens in a {name}" for name, n in step.lengths.items())
    print(
        f"{stage}, preset {config.preset}: {weights:,} parameters, vocabulary {shape.vocab_size:,}"
    )
    print(f"texts      {means} in the mean; {step.origin}")
    print(f"a step     {in_step:,.0f} tokens, {work:.2e} useful operations")
    in_all = f"{config.steps * in_step:.2e} tokens, {config.steps * work:.2e} useful operations"
    print(f"{config.steps:,} steps  {in_all}")
    for world in (1, processes):
        parts, cached = memory(config, shape, weights, texts, in_step, world, is_mlm)
        print(f"\non {world} GPU{'s' * (world > 1)}, memory of each")
        for part, size in {**parts, "in all": sum(parts.values())}.items():
            print(f"{size / 2**20:10,.0f} MiB  {part}")
        if world > 1:
            gathered = 0 if is_mlm else 4 * texts["document"] * shape.hidden_size
            sent = 4 * weights * (2 + config.zero) + 2 * gathered  # a sum goes there and back
            print("messages of a step")
            print(f"{gathered / 2**20:10,.0f} MiB  embeddings gathered")
            print(f"{4 * weights / 2**20:10,.0f} MiB  gradients summed")
            print(f"{sent / NVLINK * 1e3:10,.0f} ms   over NVLink, nothing else meanwhile")
        done = work * (4 / 3 if cached else 1)  # GradCache's first forward pass
        print(f"hours at {SHARE:.0%} of the peak" + (", with GradCache" if cached else ""))
        for name in SHOWN:
            hours = config.steps * done / (world * SHARE * PEAKS[name] * 3600)
            print(f"{hours:10,.1f} h    on {world} x {name}")


def memory(config, shape, weights, texts, in_step, world, is_mlm):
    """part -> bytes in each of `world` processes, and whether the batch goes through GradCache.

    weights: how many; texts: column -> how many in a step; in_step: tokens of a step."""
    zero = world if config.zero else 1
    parts = {"weights, float32": 4 * weights, "gradients, float32": 4 * weights}
    parts["AdamW's two moments, float32" + f", shared by {zero}" * (zero > 1)] = 8 * weights / zero
    if world > 1:
        parts["gradients once more, as one message"] = 4 * weights
    mine = in_step / world
    cached = not is_mlm and mine > config.tokens_in_memory
    at_once = min(mine, config.micro_batch_tokens if is_mlm or cached else config.tokens_in_memory)
    block = saved_bytes_per_token(shape)
    parts[f"what {shape.num_hidden_layers} blocks keep of {at_once:,.0f} tokens, bf16"] = (
        at_once * shape.num_hidden_layers * block + 2 * weights
    )
    if is_mlm:
        parts["scores of the vocabulary, a block and its gradient"] = (1 << 25) * (2 + 4 + 4 + 2)
    else:
        rows = sum(texts.values()) / world + texts["document"]  # own embeddings, and all documents
        parts["embeddings and their gradients, float32"] = 8 * rows * shape.hidden_size
        parts["cosines of a block, float32"] = min(1 << 23, texts["query"] * texts["document"]) * 12
    return parts, cached
