"""Several processes, as torchrun starts them: on one machine or many, NCCL on GPUs, else gloo.

    torchrun --nproc-per-node=8 mlm.py --preset=paper --data=DIR             # one machine
    torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        --nproc-per-node=8 mlm.py --preset=paper --data=DIR                  # on each of two

Every process has all weights and computes the gradient of its share of one global loss. Gradients
are added up once in a step (`sum_gradients`), and then all processes take the same optimizer step.
DistributedDataParallel would send gradients while others are still being computed. That saves
little here: a step of the paper's presets takes seconds, the sum of 0.5 GB over NVLink
milliseconds. Without it the model is a plain module that may run backward in pieces and send once.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.device import best_device
from common.options import InputError


def start(batch_size):
    """Joins the processes that torchrun started. Returns (rank, world size, device). Raises
    InputError where they cannot meet, or where the global batch does not divide among them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not any(values):
        return 0, 1, best_device()
    rank, world, local, local_world = (int(v) if v.isdecimal() else -1 for v in values)
    if not (0 <= rank < world and 0 <= local < local_world <= world):
        shown = ", ".join(map("=".join, zip(names, values, strict=True)))
        raise InputError(f"the environment has {shown}: start with torchrun, or unset all four")
    if batch_size % world:
        raise InputError(f"--batch-size={batch_size} does not divide by {world} processes")
    cuda = torch.cuda.is_available()
    if cuda and local_world > torch.cuda.device_count():
        raise InputError(f"--nproc-per-node: this machine has {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        try:
            store, _, _ = next(dist.rendezvous("env://"))
        except (ValueError, RuntimeError) as error:
            raise InputError(f"no meeting at MASTER_ADDR and MASTER_PORT: {error}") from None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # after a restart it still has the addresses of the processes that died
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        members = {"store": store, "rank": rank, "world_size": world}
        if cuda:
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", **members, device_id=device)
        else:
            dist.init_process_group("gloo", **members)
    return rank, world, device


def rank_and_world():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    return rank_and_world()[0] == 0


def print_once(*values):
    """print, from one process only."""
    if is_first():
        print(*values, flush=True)


def gather_objects(value):
    """The value of every process, in the order of their ranks."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def call_everywhere(function):
    """function() in every process. An error of one process is raised in all of them, as InputError,
    so that none waits for another that has left."""
    result = error = None
    try:
        result = function()
    except (InputError, OSError) as failure:
        error = str(failure)
    for rank, message in enumerate(gather_objects(error)):
        if message:
            raise InputError(f"process {rank}: {message}" if rank else message)
    return result


def sum_over_processes(value):
    """The sum of a number or a tensor over all processes."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if not isinstance(value, torch.Tensor):  # filled on the GPU: no copy, so nothing waits
        value = torch.full((), value, device=device, dtype=torch.float64)
    total = value.to(device, copy=True)
    dist.all_reduce(total)
    return total


def sum_gradients(model):
    """Adds up the gradients of all processes, in place. Each has backpropagated its share of one
    global loss, so the sum is what one process with the whole batch would have computed. (DDP takes
    the mean, so the released code multiplies the loss by the number of processes. In its later
    version gradients are that many times too large, which Adam hides and clipping does not.)"""
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters()]
        flat = parameters_to_vector(gradients)  # one message, not a hundred
        dist.all_reduce(flat)
        vector_to_parameters(flat, gradients)


def compute_in_shares(rows_of, shape, dtype, chunk=4096):
    """A tensor of this shape (n, width), of which each process computes some chunks of rows.

    rows_of(range of b row numbers) -> (b, width). The chunks, and so the numbers in them, are the
    same for any number of processes. The rows of other processes are zero until all are summed."""
    rank, world = rank_and_world()
    out = torch.zeros(shape, dtype=dtype)
    for start in range(rank * chunk, shape[0], world * chunk):
        rows = range(start, min(start + chunk, shape[0]))
        out[start : rows.stop] = torch.as_tensor(rows_of(rows))
    return sum_over_processes(out).cpu()
