"""Packed attention against softmax written out in float64, and what the model promises. That hidden
states and gradients are those of the published model: test_parity.py."""

import inspect
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import cases, random_texts, refused, softmax_attention, tiny_model
from torch.nn.attention.varlen import varlen_attn

import contrastive
import mlm
from data.store import pack
from model import (
    Block,
    ModelConfig,
    NomicBert,
    NomicBertForMaskedLM,
    Segments,
    find_segments,
    mean_pool,
    packed_attention,
    varlen_kernel,
)


def test_the_default_shape_is_the_published_model():
    with torch.device("meta"):
        models = [cls(ModelConfig()) for cls in (NomicBert, NomicBertForMaskedLM)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes == [136_731_648, 137_323_008]


CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = [9, 130, 1, 70, 70, 33]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def cu_seqlens_of(lengths):
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def check_attention(dtype, kernel=None, device=CPU, lengths=LENGTHS, H=2, D=64):
    """Whether packed_attention gives the result and the gradient that are written out, for training
    and, which may be computed in another way, for evaluation."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, H, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(lengths), H, D, dtype=torch.float64)
    expected = torch.cat([softmax_attention(*part.unbind(1)) for part in qkv.split(lengths)])
    (gradient,) = torch.autograd.grad((expected * weights).sum(), qkv)

    segments = find_segments(cu_seqlens_of(lengths), kernel, device)
    for training in (True, False):
        x = qkv.detach().to(device, dtype).requires_grad_()
        out = packed_attention(*x.unbind(1), segments, training)
        (out * weights.to(out)).sum().backward()
        for result, wanted, times in ((out, expected, 1), (x.grad, gradient, 2)):
            bounds = {"rtol": 0, "atol": times * TOLERANCE[dtype]}
            torch.testing.assert_close(result.detach().cpu().double(), wanted, **bounds)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_is_softmax_within_each_text(dtype):
    check_attention(dtype)


def test_sequences_of_equal_length_share_a_call_where_they_stand_together():
    groups = find_segments(cu_seqlens_of([2, 3, 2, 2]), None, CPU).groups
    assert groups == [(2, 1), (3, 1), (2, 2)]


def test_kernels_are_given_few_values_for_the_longest_text():
    """It sizes their grid, and torch.compile may compile anew for each value."""
    longest = {find_segments(cu_seqlens_of([n]), print, CPU).longest for n in range(1, 2049)}
    assert longest == {64, 128, 256, 512, 1024, 2048}


def test_kernels_are_for_half_precision_on_a_gpu():
    assert varlen_kernel("cpu", torch.bfloat16) is varlen_kernel("cuda", torch.float32) is None
    assert "varlen" in varlen_kernel("cuda", torch.bfloat16).__name__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kernel", [None, varlen_attn, varlen_kernel("cuda", torch.bfloat16)])
def test_attention_on_a_gpu_is_softmax_within_each_text(kernel):
    check_attention(torch.bfloat16, kernel, GPU)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None
):
    """With the parameters of flash-attn 2.8, and what its documentation says of them."""
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape == k.shape == v.shape and q.dim() == 3, "(total, nheads, headdim)"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert isinstance(max_seqlen_q, int) and max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k == max_seqlen_q and softmax_scale is None, "that is, 1 / sqrt(headdim)"
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([softmax_attention(*part) for part in parts]).to(q.dtype)


def test_the_kernels_are_called_by_their_signatures():
    """flash-attn needs a GPU: a function with its signature takes its place here."""
    check_attention(torch.bfloat16, flash_attn_varlen_func)
    names = list(inspect.signature(varlen_attn).parameters)[:7]
    assert names == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_a_compiled_block_is_one_graph_for_all_batches():
    """Forward and backward on the meta device, where shapes are computed and numbers are not: the
    graph does not break (fullgraph), and other batches do not compile it anew."""
    torch._dynamo.reset()
    with torch.device("meta"):
        block = Block(ModelConfig(hidden_size=128, num_attention_heads=2, intermediate_size=128))
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
        for N, B in ((300, 4), (411, 9), (5000, 100)):
            x = torch.empty(N, 128, dtype=torch.bfloat16, requires_grad=True)
            cos = torch.empty(N, 32, dtype=torch.bfloat16)
            cu_seqlens = torch.empty(B + 1, dtype=torch.int32)
            segments = Segments(varlen_attn, cu_seqlens, 256, [])
            with torch._dynamo.config.patch(error_on_recompile=N != 300):
                out = compiled(x, cos, cos, segments)
                out.sum().backward()
            assert out.shape == x.grad.shape == (N, 128)


def test_an_embedding_does_not_depend_on_its_batch():
    """Alone, together, in other orders; short, and beyond the trained length of 128 tokens."""
    model = tiny_model()
    texts = random_texts([3, 40, 128, 40, 7, 129, 300, 40])
    alone = torch.cat([model.embed(*pack([text])) for text in texts])
    for order in (range(8), reversed(range(8)), [6, 0, 3, 5, 1, 7, 2, 4], [4, 6]):
        order = list(order)
        together = model.embed(*pack([texts[i] for i in order]))
        assert torch.allclose(together, alone[order], atol=1e-5)
    assert (alone @ alone.T).fill_diagonal_(0).max() < 0.999, "different texts differ"


def test_an_embedding_is_the_mean_of_the_hidden_states_at_unit_length():
    hidden = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    assert mean_pool(hidden, cu_seqlens_of([2, 1])).tolist() == [[2.0, 0.0], [0.0, 5.0]]
    embeddings = tiny_model().embed(*pack(random_texts([5, 9])))
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_mean_of_a_long_text_is_precise(dtype):
    """A running sum in bf16 would stop growing at 256, and one in float32 would be off by 2e-4."""
    long = torch.full((8192, 4), 1.1, dtype=dtype)
    mean = mean_pool(long, cu_seqlens_of([8192]))
    assert mean.dtype == torch.promote_types(dtype, torch.float32)
    assert mean[0].tolist() == pytest.approx(long[0].tolist(), rel=1e-6)


def test_half_precision_stays_close_to_full():
    batch = pack(random_texts([30, 60, 128]))
    full, half = tiny_model(), tiny_model()
    half.dtype = torch.bfloat16
    assert (full.embed(*batch) * half.embed(*batch)).sum(1).min() > 0.999
    assert all(p.dtype == torch.float32 for p in half.parameters()), "weights stay float32"


def test_the_mlm_head_gives_logits_of_the_masked_positions_only():
    model = NomicBertForMaskedLM(tiny_model().config)
    tokens, cu_seqlens = pack(random_texts([10, 20]))
    positions = torch.tensor([3, 11, 29])
    logits = model(tokens, cu_seqlens, positions)
    everywhere = model(tokens, cu_seqlens, torch.arange(30))
    assert torch.allclose(logits, everywhere[positions], atol=1e-6)
    hidden, head = model.bert(tokens, cu_seqlens)[positions], model.cls.predictions.transform
    transformed = head.layer_norm(F.silu(hidden @ head.dense.weight.T))
    expected = transformed @ model.bert.embeddings.word_embeddings.weight.T
    assert torch.allclose(logits, expected, atol=1e-5)


def test_encode_keeps_the_order_and_truncates(tokenizer):
    model = tiny_model(tokenizer)
    texts = ["search_query: " + "word " * n for n in (1, 50, 3, 200, 7)]
    together = model.encode(texts, micro_batch_tokens=64)
    alone = np.concatenate([model.encode([text]) for text in texts])
    assert together.dtype == np.float32 and together.shape == (5, 64)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    one, other = model.encode(["word " * 20 + "a", "word " * 20 + "b"], max_tokens=12)
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert model.encode([]).shape == (0, 64)


def test_encode_warns_of_texts_that_are_longer_than_it_reads(tokenizer, recwarn):
    model = tiny_model(tokenizer, num_hidden_layers=0)
    model.encode(["word " * 9000, "a word"], max_tokens=128)
    assert not recwarn.list, "whoever gives a length knows it"
    with pytest.warns(UserWarning, match="1 texts are truncated to 8,192 tokens"):
        model.encode(["word " * 9000, "a word"])


@cases(
    "texts, options, message",
    *[(["a"], {"dims": n}, f"dims={n}: embeddings of this model have 64") for n in (65, 0)],
    *[(["a"], {"max_tokens": n}, f"max_tokens={n}: ") for n in (2, -1)],
    ("a text", {}, "takes a list of texts"),
    *[(texts, {}, "takes a list of strings") for texts in (None, ["a", None], ["\ud800"])],
)
def test_encode_refuses_what_it_cannot_embed(tokenizer, texts, options, message):
    with refused(re.escape(message)):
        tiny_model(tokenizer).encode(texts, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_in_a_step_waits_for_the_gpu():
    """torch raises at the first synchronisation of host and device."""
    texts = random_texts([40, 9, 70, 33])
    model, masked = tiny_model().to(GPU), tiny_model(cls=NomicBertForMaskedLM).to(GPU)
    model.dtype = masked.bert.dtype = torch.bfloat16
    batch = (*pack(texts, GPU), torch.arange(10, device=GPU), torch.arange(10, device=GPU))

    def step():
        mlm.backward_in_chunks(masked, batch, 10)
        contrastive.grad_cache(model, texts, lambda x: contrastive.info_nce(*x.chunk(2), 0.02), 64)

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
