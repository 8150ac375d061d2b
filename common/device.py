"""The processor that a program runs on, and how fast it is."""

import numpy as np
import torch

# dense bf16 operations per second, from NVIDIA's data sheets; the first name that fits counts
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
PEAK_FLOPS |= {"A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def best_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_flops(device):
    """Operations per second of a GPU that is in PEAK_FLOPS, else None."""
    return next((PEAK_FLOPS[name] for name in PEAK_FLOPS if name in device_name(device)), None)


def training_flops(config, lengths, masked_share=0.0):
    """Floating-point operations to train on texts of these lengths (B,), in tokens. Per token: 6
    for each weight of a matrix that it passes (2 forward, 4 backward), and 12 C L per layer for
    attention in a text of L tokens. In stage 1 the head is added, for the masked share of tokens.
    GradCache's second forward pass is not counted: useful work is what the result needs."""
    C, lengths = config.hidden_size, np.asarray(lengths, float)
    weights = config.num_hidden_layers * (4 * C * C + 3 * C * config.intermediate_size)
    weights += masked_share * (C * C + C * config.vocab_size)
    attention = 12 * config.num_hidden_layers * C * (lengths**2).sum()
    return float(6 * weights * lengths.sum() + attention)


def fast_dtype(device):
    """bfloat16 on GPUs since Ampere and CPUs with AVX512_BF16 or AMX, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def move_to_device(array, device):
    """A tensor or numpy array on a device. From pinned memory the copy to a GPU is queued behind
    the work that it already has, and the program need not wait."""
    array, device = torch.as_tensor(array), torch.device(device)
    if device.type == "cuda" and array.device.type == "cpu":
        return array.pin_memory().to(device, non_blocking=True)
    return array.to(device)


def choose_dtype(precision, device):
    """The type of activations for --precision: auto, bf16 or float32."""
    if precision == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if precision == "bf16" else torch.get_default_dtype()  # float64 in tests
