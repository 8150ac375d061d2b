"""The model against its definition, written out once more, plainly and in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import softmax_attention, tiny_model

from data.store import pack
from model import Config, NomicBert, NomicBertForMaskedLM, mean_pool
from options import InputError

# ------------------------------------------------------------------------------------------------
# The plain twin: one text, no packing, nothing fused


def rotated(x, base):
    """Position p of (L, H, D): pairs (i, i + D/2) turned by p * base ^ (-2i / D)."""
    L, _, D = x.shape
    angle = torch.arange(L)[:, None] * base ** (-2.0 * torch.arange(D // 2) / D)  # (L, D/2)
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def reference(model, tokens):
    """The hidden states of one text in float64, from the weights by their published names."""
    w = {name: p.double() for name, p in model.state_dict().items()}
    config, L = model.config, len(tokens)
    H, C = config.num_attention_heads, config.hidden_size
    D = C // H
    base = config.rope_base
    if L > config.trained_length:
        s = config.rope_factor
        base *= (s * L / config.trained_length - (s - 1)) ** (D / (D - 2))

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-12).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = (
        w["embeddings.word_embeddings.weight"][tokens]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, "emb_ln")
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        q, k, v = (x @ w[f"{layer}.attn.Wqkv.weight"].T).view(L, 3, H, D).unbind(1)
        mixed = softmax_attention(rotated(q, base), rotated(k, base), v).reshape(L, C)
        x = norm(x + mixed @ w[f"{layer}.attn.out_proj.weight"].T, f"{layer}.norm1")
        up, gate = x @ w[f"{layer}.mlp.fc11.weight"].T, x @ w[f"{layer}.mlp.fc12.weight"].T
        x = norm(
            x + (up * gate * gate.sigmoid()) @ w[f"{layer}.mlp.fc2.weight"].T, f"{layer}.norm2"
        )
    return x


def texts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 300, length) for length in lengths]


# ------------------------------------------------------------------------------------------------


def test_the_default_shape_is_the_published_model():
    with torch.device("meta"):
        count = {
            cls: sum(p.numel() for p in cls(Config()).parameters())
            for cls in (NomicBert, NomicBertForMaskedLM)
        }
    assert count == {NomicBert: 136_731_648, NomicBertForMaskedLM: 137_323_008}


def test_parameters_have_their_published_names():
    with torch.device("meta"):
        names = set(NomicBertForMaskedLM(Config(num_hidden_layers=1)).state_dict())
    assert names == {
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.emb_ln.weight",
        "bert.emb_ln.bias",
        "bert.encoder.layers.0.attn.Wqkv.weight",
        "bert.encoder.layers.0.attn.out_proj.weight",
        "bert.encoder.layers.0.mlp.fc11.weight",
        "bert.encoder.layers.0.mlp.fc12.weight",
        "bert.encoder.layers.0.mlp.fc2.weight",
        "bert.encoder.layers.0.norm1.weight",
        "bert.encoder.layers.0.norm1.bias",
        "bert.encoder.layers.0.norm2.weight",
        "bert.encoder.layers.0.norm2.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.layer_norm.weight",
        "cls.predictions.transform.layer_norm.bias",
        "cls.predictions.decoder.weight",
    }


@pytest.mark.parametrize("length", [1, 2, 77, 128, 129, 500])
def test_hidden_states_equal_the_model_written_out(length):
    """Up to the trained length of 128, and beyond it with Dynamic NTK."""
    model = tiny_model()
    (text,) = texts_of([length])
    expected = reference(model, torch.from_numpy(text))
    assert torch.allclose(model(*pack([text])).double(), expected, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_batch():
    """Alone, together, in other orders; short, and beyond the trained length of 128 tokens."""
    model = tiny_model()
    texts = texts_of([3, 40, 128, 40, 7, 129, 300, 40])
    alone = torch.cat([model.embed(*pack([text])) for text in texts])
    for order in (range(8), reversed(range(8)), [6, 0, 3, 5, 1, 7, 2, 4], [4, 6]):
        order = list(order)
        together = model.embed(*pack([texts[i] for i in order]))
        assert torch.allclose(together, alone[order], atol=1e-5)
    assert (alone @ alone.T).fill_diagonal_(0).max() < 0.999, "different texts differ"


def test_gradients_do_not_depend_on_the_order_of_the_batch():
    texts = texts_of([3, 40, 128, 40, 7])
    gradients = []
    for order in ([0, 1, 2, 3, 4], [2, 4, 0, 3, 1]):
        model = tiny_model()
        model.embed(*pack([texts[i] for i in order])).square().sum(0)[:7].sum().backward()
        gradients.append(model.encoder.layers[0].attn.Wqkv.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_an_embedding_is_the_mean_of_the_hidden_states_at_unit_length():
    hidden = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    assert torch.equal(mean_pool(hidden, cu_seqlens), torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    embeddings = tiny_model().embed(*pack(texts_of([5, 9])))
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(2))


def test_half_precision_stays_close_to_full():
    texts = texts_of([30, 60, 128])
    full, half = tiny_model(), tiny_model()
    half.dtype = torch.bfloat16
    cosine = (full.embed(*pack(texts)) * half.embed(*pack(texts))).sum(1)
    assert cosine.min() > 0.999
    assert all(p.dtype == torch.float32 for p in half.parameters()), "weights stay float32"


def test_the_mlm_head_scores_only_the_masked_places():
    model = NomicBertForMaskedLM(tiny_model().config)
    tokens, cu_seqlens = pack(texts_of([10, 20]))
    places = torch.tensor([3, 11, 29])
    everywhere = model(tokens, cu_seqlens, torch.arange(30))
    assert torch.allclose(model(tokens, cu_seqlens, places), everywhere[places], atol=1e-6)
    hidden = model.bert(tokens, cu_seqlens)[places]
    head = model.cls.predictions
    transformed = head.transform.layer_norm(F.silu(hidden @ head.transform.dense.weight.T))
    expected = transformed @ model.bert.embeddings.word_embeddings.weight.T
    assert torch.allclose(everywhere[places], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# encode


def test_encode_keeps_the_order_and_cuts_to_max_tokens(tokenizer):
    model = tiny_model(tokenizer)
    texts = ["search_query: " + "word " * n for n in (1, 50, 3, 200, 7)]
    together = model.encode(texts, micro_batch_tokens=64)
    alone = np.concatenate([model.encode([text]) for text in texts])
    assert together.dtype == np.float32 and together.shape == (5, model.config.hidden_size)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    long, longer = model.encode(["word " * 20 + "a", "word " * 20 + "b"], max_tokens=12)
    np.testing.assert_allclose(long, longer, atol=1e-5)


def test_encode_takes_the_first_dimensions_at_unit_length(tokenizer):
    model = tiny_model(tokenizer)
    full, cut = model.encode(["some words"]), model.encode(["some words"], dims=16)
    np.testing.assert_allclose(cut[0], full[0, :16] / np.linalg.norm(full[0, :16]), atol=1e-6)
    with pytest.raises(InputError, match="dims=4096: embeddings of this model have 64 dimensions"):
        model.encode(["some words"], dims=4096)
    with pytest.raises(InputError, match="a list of texts"):
        model.encode("some words")
    assert model.encode([]).shape == (0, 64)


def test_layer_norm_takes_off_the_mean_before_the_cut(tokenizer):
    """As nomic-embed-text-v1.5: LayerNorm without weights, the first dimensions, unit length."""
    model = tiny_model(tokenizer)
    full = model.encode(["some words"])[0]
    model.layer_norm = True
    expected = (full - full.mean())[:16]
    cut = model.encode(["some words"], dims=16)[0]
    np.testing.assert_allclose(cut, expected / np.linalg.norm(expected), atol=1e-6)


def test_the_mean_of_a_long_text_is_exact_to_the_last_digits():
    """A running sum in float32 is off by 2e-4 here."""
    hidden = torch.full((8192, 4), 1.1)
    with torch.no_grad():
        mean = mean_pool(hidden, torch.tensor([0, 8192], dtype=torch.int32))
    assert torch.allclose(mean, hidden[:1], rtol=1e-6)


def test_a_text_of_no_tokens_is_an_error():
    with pytest.raises(InputError, match="text 1 of the batch has no tokens"):
        pack([np.array([2, 3]), np.array([], int)])
