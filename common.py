"""What all three stages need and no lesson is in: a run's directory, its checkpoints, its log.

A run writes into one directory, out/<stage>/:

    config.json, model.safetensors, tokenizer.json   the model, and what others need to open it
    state.pt                                         weights, optimizer, step: for `--resume`
    run.json                                         options, sources of data, versions
    log.jsonl                                        an object per logged step
    README.md                                        the model card, made of these (card.py)

Each file is replaced as a whole: written under another name, then renamed. A kill at any moment
leaves the old one or the new one. state.pt has all that a resume needs, so that it never has to fit
another file.
"""

import json
import math
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import attention
from options import InputError, inherit
from processes import (
    fast_dtype,
    is_first,
    print0,
    sum_over_processes,
    the_same,
    together,
    wait_for_all,
)

# ------------------------------------------------------------------------------------------------
# What a run begins with

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SHAPE += ("rope_base",)


def make_default_data(folder):
    """Prepares the embedded data where it is missing. Any other missing folder is an error."""
    if Path(folder, "meta.json").is_file():
        return
    if folder != "out/pydocs":
        own = "your own text: data/folder.py or data/jsonl.py"
        raise InputError(
            f"no data in {folder}: python data/pydocs.py --out={folder} makes some; {own}"
        )
    if is_first():
        print(f"{folder} is missing: preparing it, as python data/pydocs.py does", flush=True)
        from data import pydocs

        pydocs.prepare(pydocs.Options(out=folder))
    wait_for_all()


def model_shape(config, vocab_size, trained_length):
    """The model's config of a run that starts from random weights."""
    from model import Config

    if config.hidden_size % (2 * config.num_attention_heads):
        heads = config.num_attention_heads
        raise InputError(f"--hidden-size={config.hidden_size} makes no {heads} heads of even size")
    vocab_size = -(-vocab_size // 64) * 64  # matrix products like multiples of 64
    shape = {name: getattr(config, name) for name in SHAPE}
    return Config(vocab_size=vocab_size, trained_length=trained_length, **shape)


def open_encoder(config, origin):
    """The encoder that stage 2 or 3 begins with: the checkpoint of --init, whose shape and
    tokenizer the run inherits, or random weights."""
    from data.store import load_tokenizer
    from model import NomicBert

    where = config.out if config.resume else config.init
    if where:
        model = together(lambda: NomicBert.from_pretrained(where))
        if model.tokenizer is None:
            raise InputError(f"{where} has no tokenizer.json: put that of the data there")
        names = (*SHAPE, "trained_length")
        inherit(config, origin, {name: getattr(model.config, name) for name in names}, where)
    else:
        print0(
            "starting from random weights; from stage 1: python mlm.py, then --init=out/mlm here"
        )
        tokenizer = load_tokenizer(config.data)
        torch.manual_seed(config.seed)
        model = NomicBert(model_shape(config, tokenizer.get_vocab_size(), config.trained_length))
        model.tokenizer = tokenizer
    for name in ("query_tokens", "document_tokens"):
        if getattr(config, name) > config.trained_length:
            name, limit = name.replace("_", "-"), config.trained_length
            raise InputError(f"--{name} is beyond the {limit} tokens that the model is trained for")
    return model


def choose_dtype(precision, device):
    """The type that an option names: auto, bf16, float32 or float64."""
    named = {"auto": fast_dtype(device), "bf16": torch.bfloat16, "float32": torch.float32}
    named["float64"] = torch.float64  # of the weights as well: to compare runs, not to train
    if precision not in named:
        raise InputError(f"--precision={precision}: give auto, bf16, float32 or float64")
    return named[precision]


def place(model, encoder, config, device):
    """Readies a model for training on a device: precision, the way to compute attention, and
    whether blocks are compiled. encoder: the NomicBert in the model."""
    encoder.dtype = choose_dtype(config.precision, device)
    encoder.attention = attention.choose(config.attention, device, encoder.dtype)
    model.to(device, torch.float64 if encoder.dtype == torch.float64 else None)
    if config.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError(
                "--compile needs a C++ compiler on a CPU: install g++, or leave it out"
            )
        compile_blocks(encoder)
    print0(
        f"{device}, activations in {str(encoder.dtype)[6:]}, attention: {encoder.attention}"
        + ", compiled" * config.compile
    )


def compile_blocks(encoder):
    """Lets torch.compile fuse the operations of each block. They are all alike, so that one
    compilation serves them all; shapes are dynamic, so that it serves all batches."""
    # every batch has other groups, for which this would be compiled anew
    attention.portable_attention = torch.compiler.disable(attention.portable_attention)
    for layer in encoder.encoder.layers:
        layer.compile(dynamic=True)


def adamw(model, config, betas, eps):
    """AdamW, with weight decay on matrices and not on norms.

    With --zero each process keeps the two moments of its share of the parameters only, does their
    step, and sends them to the others: stage 1 of ZeRO (arXiv 1910.02054; [code] has stage 2).
    FSDP2 would shard weights too, but it turns them into DTensors that every reader of the model
    would meet; here the model stays as it is, and so do checkpoints."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms}]
    settings = {"lr": config.lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True}
    if config.zero and dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer  # a second to import

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# ------------------------------------------------------------------------------------------------
# A run's directory

FREE_AT_RESUME = ("preset", "init", "out", "resume", "stop_after", "micro_batch_tokens")
FREE_AT_RESUME += ("tokens_in_memory", "log_every", "eval_every", "save_every")
FREE_AT_RESUME += ("attention", "compile", "zero")


def begin(config, origin, model, optimizer):
    """Prints the config and readies OUT. Returns the step to begin with; 0 without --resume."""
    from card import write_run

    for key, value in asdict(config).items():
        print0(f"  {key:20} {value!s:20} {origin[key]}")
    count = sum(p.numel() for p in model.parameters())
    print0(f"{count:,} parameters, torch {torch.__version__}")
    out, step = Path(config.out), 0
    if config.resume:
        step = together(lambda: load_state(config, model, optimizer))
    elif is_first() and (out / "state.pt").exists():
        shutil.rmtree(f"{out}.previous", ignore_errors=True)
        os.rename(out, f"{out}.previous")
        print(f"{out} held an earlier run: that is {out}.previous now")
    if not the_same((step, sum(p.detach().double().sum().item() for p in model.parameters()))):
        raise InputError("processes begin with different weights: they read other checkpoints")
    if is_first() and not (config.resume and (out / "run.json").is_file()):
        write_run(config, origin, model)
    if is_first() and step < config.steps:
        (out / "results.json").unlink(missing_ok=True)  # evaluate.py measured other weights
    save(config, model, optimizer, step)  # a full disk shows itself now, and not in an hour
    wait_for_all()
    return step


def load_state(config, model, optimizer):
    """Takes up OUT/state.pt and returns its step. Raises InputError where it is missing, damaged or
    of a run with other settings."""
    path, log_path = Path(config.out, "state.pt"), Path(config.out, "log.jsonl")
    if not path.is_file():
        raise InputError(f"--resume: there is no {path}; without --resume a new run begins")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file raises all kinds
        raise InputError(
            f"{path} is damaged ({type(error).__name__}); begin without --resume"
        ) from None
    for key, value in asdict(config).items():
        before = state["config"].get(key, value)  # of an earlier version, without that option
        if key not in FREE_AT_RESUME and value != before:
            key = key.replace("_", "-")
            raise InputError(f"--resume keeps a run's settings: --{key} was {before}, not {value}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if is_first() and log_path.is_file():  # what came after the checkpoint is about to come again
        lines = log_path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
        kept = [line for line in whole if json.loads(line)["step"] <= state["step"]]
        replace(log_path, lambda temporary: temporary.write_text("".join(kept)))
    print0(f"resuming {config.out} at step {state['step']}")
    return state["step"]


def saves(done, config):
    """Whether a checkpoint is due after so many steps: by its own clock, at the end, and when a
    signal asked to stop. Several processes have to agree on that: they do, at every logged step."""
    if done % config.save_every == 0 or done in (config.steps, config.stop_after):
        return True
    if dist.is_initialized() and done % config.log_every:
        return False
    return sum_over_processes(len(asked_to_stop)) > 0


def save(config, model, optimizer, step):
    """Writes the checkpoint: the model for everybody, then all that a resume needs. Leaves, if a
    signal asked for it."""
    from card import write_card

    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()  # with --zero: the first process gathers what it writes
    if is_first():
        model.save_pretrained(config.out)
        write_card(config.out)
        state = {"step": step, "config": asdict(config)}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        replace(Path(config.out, "state.pt"), lambda path: torch.save(state, path))
    if step < config.steps and sum_over_processes(len(asked_to_stop)):
        number = signal.Signals(asked_to_stop[0] if asked_to_stop else signal.SIGTERM)
        print0(
            f"\nstopped by {number.name}: {config.out} is saved at step {step}, go on by --resume"
        )
        sys.exit(128 + number)


asked_to_stop = []  # the signals that came


def remember(number, frame):
    """SIGTERM, the warning that preemptible machines get, and Ctrl-C let the step end, save and
    leave (`saves`, `save`); a second Ctrl-C leaves at once."""
    if number == signal.SIGINT and number in asked_to_stop:
        raise KeyboardInterrupt
    asked_to_stop.append(number)


def replace(path, write):
    """Writes a file whole or not at all: write(temporary path), then rename."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save: RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path}: {error}; what was there before is untouched"
        ) from None


# ------------------------------------------------------------------------------------------------
# What a person sees


def steps(start, config):
    """The numbers of the steps still to do, behind a progress bar in the first process."""
    end = min(config.steps, config.stop_after or config.steps)

    def numbers():
        before = {n: signal.signal(n, remember) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield from range(start, end)
        finally:
            asked_to_stop.clear()
            for number, handler in before.items():
                signal.signal(number, handler)

    quiet = not is_first()
    return tqdm(numbers(), initial=start, total=config.steps, mininterval=1, disable=quiet)


def ahead(make):
    """make, such that make(step + 1) is computed in a thread while step is trained on."""
    thread, coming = ThreadPoolExecutor(1), {}

    def get(step):
        batch = coming.pop(step, None) or thread.submit(make, step)
        coming[step + 1] = thread.submit(make, step + 1)
        return batch.result()

    return get


def finite(loss, step, config):
    """The loss as a number. Raises InputError if it is none, before a checkpoint is made of it."""
    if not math.isfinite(loss := float(loss)):
        raise InputError(
            f"the loss is {loss} at step {step}: lower --lr; {config.out} holds the last checkpoint"
        )
    return loss


def log(config, bar, record, sample=""):
    """A line in OUT/log.jsonl; the same in the progress bar; the sample above it."""
    if not is_first():
        return
    with open(Path(config.out, "log.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")
    shown = {"loss": ".3f", "dev_accuracy": ".3f", "dev_ndcg": ".3f", "lr": ".1e"}
    shown["tokens_per_second"] = ",.0f"
    text = " ".join(f"{key} {record[key]:{form}}" for key, form in shown.items() if key in record)
    bar.set_postfix_str(text, refresh=False)
    if sample:
        bar.write(f"step {record['step']}: {text}\n    {sample}")
