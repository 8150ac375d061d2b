"""Several processes, as torchrun starts them: on one machine or many, with NCCL on GPUs, else gloo.

    torchrun --nproc-per-node=8 mlm.py --preset=paper --data=DIR             # one machine
    torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        --nproc-per-node=8 mlm.py --preset=paper --data=DIR                  # on each of two

Every process has all weights and computes the gradient of its share of one global loss. Gradients
are added up once in a step (`sum_gradients`), and then all do the same optimizer step.

That is DistributedDataParallel without its wrapper. The wrapper would send gradients while others
are still computed, which saves little here: a step of the paper's presets takes seconds, the sum of
0.5 GB over NVLink takes milliseconds (--dry-run shows both). In return the model stays a plain
module, GradCache and the MLM head may go backward in pieces and still send once, and the sum needs
no factor: DDP takes the mean over processes.
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from options import InputError

MAY_BE_ZERO = ("seed", "warmup", "stop_after", "negatives", "tokens_in_memory", "eval_every")


def best_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device):
    """bfloat16 where the processor multiplies it faster (GPUs since Ampere, CPUs with AVX512_BF16
    or AMX), else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def start(config):
    """Joins the processes that torchrun started. Returns (rank, world size, device).

    Raises InputError for numbers out of range. Batch sizes are global: this one has to divide among
    the processes."""
    for key, value in asdict(config).items():
        if type(value) is int and value < (key not in MAY_BE_ZERO):
            least, key = int(key not in MAY_BE_ZERO), key.replace("_", "-")
            raise InputError(f"--{key}={value}: give {least} or more")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and Path(config.out, "state.pt").is_file():
        config.resume = True  # torchrun --max-restarts began anew after a process died
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, best_device()
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if cuda and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise InputError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
    if config.batch_size % world:
        raise InputError(f"--batch-size={config.batch_size} does not divide by {world} processes")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # after a restart torchrun's store still has the addresses of the processes that died
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt-{restarts}", store)
        backend, own = ("nccl", device) if cuda else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=own)
    return dist.get_rank(), world, device


def is_first():
    return int(os.environ.get("RANK", 0)) == 0


def print0(*values):
    """print, from one process only."""
    if is_first():
        print(*values, flush=True)


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def together(do):
    """do() in every process. An InputError in one of them is raised in all, so that the first says
    it and nobody waits for those that left."""
    result = error = None
    try:
        result = do()
    except InputError as failure:
        error = str(failure)
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        failed = [rank for rank, message in enumerate(errors) if message]
        error = errors[failed[0]] if failed else None
        if failed and failed[0] > 0:
            error = f"process {failed[0]}: {error}"
    if error:
        raise InputError(error)
    return result


def the_same(value):
    """Whether all processes have an equal value: a number or a string."""
    if not dist.is_initialized():
        return True
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


def sum_over_processes(value):
    """The sum of a number or a tensor over all processes."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if not isinstance(value, torch.Tensor):  # filled in on the GPU: nothing is copied, nobody waits
        value = torch.full((), value, device=device, dtype=torch.float64)
    total = value.to(device, copy=True)
    dist.all_reduce(total)
    return total


def sum_gradients(model):
    """Adds up the gradients of all processes, in place. Each has backpropagated its share of one
    global loss, so that the sum is what one process with the whole batch would have found. (The
    released code multiplies the loss by the number of processes, as DDP takes the mean. Its first
    version is exact; in its later one gradients are that many times too large, which Adam hides and
    clipping does not.)"""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message, not a hundred
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, total in zip(gradients, parts, strict=True):
        gradient.copy_(total.view_as(gradient))
