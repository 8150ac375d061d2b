"""The ways to compute attention over packed texts, against softmax written out in float64.

The portable way runs everywhere. The two kernels for CUDA run where there is a GPU that has them;
elsewhere the tests say how little they check."""

import inspect

import numpy as np
import pytest
import torch
from tiny import softmax_attention

import attention as module
from attention import Packing, attention, choose, kernel_of, packing
from model import Block, Config
from options import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = [9, 130, 1, 70, 70, 33]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def cu_seqlens_of(lengths):
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def written_out(lengths, H, D):
    """q, k and v (N, 3, H, D), weights of a sum over the result, the result, and its gradient."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, H, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(lengths), H, D, dtype=torch.float64)
    result = torch.cat([softmax_attention(*part.unbind(1)) for part in qkv.split(lengths)])
    gradient = torch.autograd.grad((result * weights).sum(), qkv)[0]
    return qkv.detach(), weights, result, gradient


def agrees(way, dtype, device, lengths=LENGTHS, D=64):
    """Whether this way gives the result and the gradient that were written out."""
    qkv, weights, result, gradient = written_out(lengths, 2, D)
    order, texts = packing(cu_seqlens_of(lengths), way, device)
    order = torch.arange(len(qkv)) if order is None else order.cpu()
    x = qkv[order].to(device, dtype).requires_grad_()
    out = attention(*x.unbind(1), texts)
    (out * weights[order].to(out)).sum().backward()
    torch.testing.assert_close(
        out.detach().cpu().double(), result[order], rtol=0, atol=TOLERANCE[dtype]
    )
    torch.testing.assert_close(
        x.grad.cpu().double(), gradient[order], rtol=0, atol=2 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_portable_way_is_softmax_within_each_text(dtype):
    agrees("portable", dtype, CPU)


def test_equal_lengths_come_together_the_longest_first():
    order, texts = packing(cu_seqlens_of([2, 3, 2]), "portable", CPU)
    assert order.tolist() == [2, 3, 4, 0, 1, 5, 6] and texts.groups == [(3, 1), (2, 2)]
    order, _ = packing(cu_seqlens_of([3, 2, 2]), "portable", CPU)
    assert order is None, "they stand right already"


def test_kernels_are_told_a_longest_text_that_takes_few_values():
    """It sizes their grid, and torch.compile may compile anew for each value."""
    longest = {packing(cu_seqlens_of([n]), "varlen", CPU)[1].longest for n in range(1, 2049)}
    assert longest == {64, 128, 256, 512, 1024, 2048}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("way", ["flash-attn", "varlen", "portable"])
def test_on_a_gpu_each_way_agrees_with_the_reference(way):
    try:
        choose(way, GPU, torch.bfloat16)
    except InputError as error:
        pytest.skip(str(error))
    agrees(way, torch.bfloat16, GPU)


# ------------------------------------------------------------------------------------------------
# What can be checked of the kernels without a GPU


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The documented signature of flash-attn 2.8, and what its documentation says of arguments."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape == k.shape == v.shape and q.dim() == 3, "(total, nheads, headdim)"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert isinstance(max_seqlen_q, int) and max_seqlen_q >= cu_seqlens_q.diff().max()
    assert (max_seqlen_k, dropout_p, causal) == (max_seqlen_q, 0.0, False)
    assert softmax_scale is None, "its default is 1 / sqrt(headdim)"
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([softmax_attention(*part) for part in parts]).to(q.dtype)


def test_flash_attn_is_called_as_documented_and_only_that_is_checked(monkeypatch):
    """Its kernel does not run here: a function with its signature stands in for it."""
    monkeypatch.setattr(module, "kernel_of", lambda way: flash_attn_varlen_func)
    agrees("flash-attn", torch.bfloat16, CPU)


@pytest.mark.skipif(kernel_of("varlen") is None, reason="this torch has no varlen_attn")
def test_varlen_attn_is_called_as_documented():
    names = list(inspect.signature(kernel_of("varlen")).parameters)[:7]
    assert names == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.skipif(kernel_of("varlen") is None, reason="this torch has no varlen_attn")
def test_a_compiled_block_is_one_graph_for_all_batches():
    """Forward and backward on the meta device, where shapes are computed and numbers are not: the
    graph does not break (fullgraph), and other batches do not compile it anew."""
    torch._dynamo.reset()
    with torch.device("meta"):
        block = Block(Config(hidden_size=128, num_attention_heads=2, intermediate_size=128))
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
        for N, B in ((300, 4), (411, 9), (5000, 100)):
            x = torch.empty(N, 128, dtype=torch.bfloat16, requires_grad=True)
            cos = torch.empty(N, 32, dtype=torch.bfloat16)
            texts = Packing(kernel_of("varlen"), torch.empty(B + 1, dtype=torch.int32), 256, [])
            with torch._dynamo.config.patch(error_on_recompile=N != 300):
                out = compiled(x, cos, cos, texts)
                out.sum().backward()
            assert out.shape == x.grad.shape == (N, 128)


# ------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "message"),
    [
        ("fast", CPU, torch.float32, "--attention=fast: give auto, flash-attn, varlen, portable"),
        ("varlen", CPU, torch.bfloat16, "--attention=varlen: it needs a CUDA GPU"),
        ("flash-attn", CPU, torch.bfloat16, "--attention=flash-attn: it needs a CUDA GPU"),
        ("varlen", GPU, torch.float32, "it computes in bf16, not in torch.float32"),
    ],
)
def test_a_way_that_does_not_work_here_is_refused(wanted, device, dtype, message):
    with pytest.raises(InputError, match=message):
        choose(wanted, device, dtype)


@pytest.mark.parametrize(
    ("installed", "first"),
    [
        (("flash-attn", "varlen"), "flash-attn"),
        (("varlen",), "varlen"),
        ((), "portable"),
    ],
)
def test_auto_takes_the_first_that_works(installed, first, monkeypatch):
    monkeypatch.setattr(module, "kernel_of", lambda way: print if way in installed else None)
    assert choose("auto", GPU, torch.bfloat16) == first
    assert choose("auto", CPU, torch.bfloat16) == choose("auto", GPU, torch.float32) == "portable"
    if not installed:
        with pytest.raises(InputError, match="varlen: it is not installed: torch 2.11 has it"):
            choose("varlen", GPU, torch.bfloat16)
