"""A model directory opens in each form that the model is published in, or one line says why not."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cases, refused, tiny_model

from common import checkpoint
from model import ModelConfig, NomicBert, NomicBertForMaskedLM

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
TEXTS = ["", "some words", "a much longer text " * 60]

# What published directories look like, written from one of ours
PUBLISHED = {"model_type": "nomic_bert", "activation_function": "swiglu", "n_positions": 8192}
PUBLISHED |= {"auto_map": {"AutoModel": "modeling_hf_nomic_bert.NomicBertModel"}, "prenorm": False}
PUBLISHED |= {"layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0}
PUBLISHED |= {"rotary_emb_interleaved": False, "rotary_scaling_factor": None, "type_vocab_size": 2}
NAMES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "vocab_size": "vocab_size"}
NAMES |= {"n_inner": "intermediate_size", "n_layer": "num_hidden_layers"}


def publish(directory, keep=False, **more):
    """config.json with GPT-2's names, as it came with nomic-bert-2048 and nomic-embed-text.

    keep: it has transformers' names as well."""
    path = directory / CONFIG
    native = json.loads(path.read_text())
    shape = {published: native[ours] for published, ours in NAMES.items()}
    path.write_text(json.dumps({**(native if keep else {}), **PUBLISHED, **shape, **more}))


def v1(directory, **more):
    """nomic-embed-text-v1: does not say that it was trained at 2,048; it reads up to 8,192."""
    publish(directory, max_position_embeddings=8192, **more)


def v1_5_of_today(directory):
    """nomic-embed-text-v1.5 since transformers has the model: both dialects in one file."""
    rope = {"rope_theta": 1000.0, "rope_type": "default"}
    publish(directory, keep=True, rope_parameters=rope, max_trained_positions=2048)


def nomic_bert_2048(directory):
    """The masked language model: everything under bert., a head, and the decoder stored as well."""
    publish(directory, n_positions=2048, rotary_scaling_factor=2)
    weights = load_file(directory / WEIGHTS)
    words = weights["embeddings.word_embeddings.weight"].clone()
    head = {"transform.dense.weight": torch.eye(64), "decoder.weight": words}
    head |= {f"transform.layer_norm.{x}": torch.ones(64) for x in ("weight", "bias")}
    weights = {f"bert.{name}": weight for name, weight in weights.items()}
    weights |= {f"cls.predictions.{name}": weight for name, weight in head.items()}
    save_file(weights, directory / WEIGHTS)


@pytest.fixture
def directory(tokenizer, tmp_path):
    """A checkpoint of ours, trained at 2,048 tokens."""
    tiny_model(tokenizer, trained_length=2048).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def embeddings(directory):
    return NomicBert.from_pretrained(directory, dtype=torch.float32).encode(TEXTS)


@pytest.mark.parametrize("variant", [v1, v1_5_of_today, nomic_bert_2048])
def test_every_published_variant_gives_the_same_embeddings(directory, variant):
    expected = embeddings(directory)
    variant(directory)
    np.testing.assert_array_equal(embeddings(directory), expected)
    config = NomicBert.from_pretrained(directory).config
    assert (config.rope_base, config.trained_length) == (1000.0, 2048)
    assert config.layer_norm_eps == 1e-12
    if variant is nomic_bert_2048:
        model = NomicBertForMaskedLM.from_pretrained(directory)
        words = model.bert.embeddings.word_embeddings.weight
        assert model.cls.predictions.decoder.weight is words, "tied"


def test_weights_in_half_precision_open_as_float32(directory):
    expected = embeddings(directory)
    weights = load_file(directory / WEIGHTS)
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, directory / WEIGHTS)
    model = NomicBert.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.encode(TEXTS) * expected).sum(1).min() > 0.999


@cases(
    "in_file, given, expected",
    *[(None, None, ("none", 2.0)), (None, 3.0, ("dynamic", 3.0)), (2, None, ("dynamic", 2.0))],
)
def test_a_factor_in_the_file_or_as_argument_means_dynamic_ntk(directory, in_file, given, expected):
    v1(directory, rotary_scaling_factor=in_file)
    rope = NomicBert.from_pretrained(directory, rope_factor=given).rope
    assert (rope.scaling, rope.factor, rope.trained_length) == (*expected, 2048)


def test_an_encoder_is_no_masked_language_model_and_does_not_encode_without_a_tokenizer(directory):
    with refused("has no MLM head"):
        NomicBertForMaskedLM.from_pretrained(directory)
    (directory / TOKENIZER).unlink()
    with refused("no tokenizer.json beside the model"):
        NomicBert.from_pretrained(directory).encode(["words"])


@pytest.mark.parametrize("cls", [NomicBert, NomicBertForMaskedLM])
@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic"])
def test_saved_and_opened_again_is_equal_bit_for_bit(tokenizer, tmp_path, cls, scaling):
    model = tiny_model(tokenizer, cls, rope_scaling=scaling, rope_factor=3.0)
    model.save_pretrained(tmp_path / "a")
    again = cls.from_pretrained(tmp_path / "a", dtype=torch.float32)
    more = {"rope_factor": None} if scaling == "none" else {}  # then config.json has no factor
    assert vars(again.config) | more == vars(model.config) | more
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    again.save_pretrained(tmp_path / "b")
    written = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")}
    assert len(written) >= 7
    for path in written:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def damage(path, change):
    """change: None removes the file; else its text, what becomes of its bytes, or entries of its
    JSON or safetensors, of which None removes one."""
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    elif callable(change):
        path.write_bytes(change(path.read_bytes()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        save_file({k: v for k, v in (load_file(path) | change).items() if v is not None}, path)


def thirds(*sizes):
    """transformers' three matrices instead of one, of which a size of 0 leaves one out."""
    rows = {x: torch.zeros(size, 64) for x, size in zip("qkv", sizes, strict=True) if size}
    return {QKV: None} | {Q.replace("q_proj", f"{x}_proj"): rows[x] for x in rows}


POOLING = "1_Pooling/config.json"
NAN = float("nan")
NORM, BIAS = "encoder.layers.1.norm1.weight", "encoder.layers.0.attn.Wqkv.bias"
QKV, Q = "encoder.layers.0.attn.Wqkv.weight", "encoder.layers.0.self_attn.q_proj.weight"
FLOAT8 = torch.ones(64).to(torch.float8_e4m3fn)


@cases(
    "name, change, message",
    (CONFIG, None, "config.json cannot be read: No such"),
    (CONFIG, "{", "config.json is not JSON"),
    (CONFIG, {"vocab_size": 512}, "word_embeddings.weight is .* should be .512"),
    (POOLING, {"pooling_mode_cls_token": True}, "takes the mean of all tokens"),
    (POOLING, {"pooling_mode": ["cls"]}, "takes the mean of all tokens"),
    (WEIGHTS, lambda data: data[:-100], "model.safetensors cannot be read"),
    (WEIGHTS, {NORM: None}, "norm1.weight is missing; by config.json it should be"),
    (WEIGHTS, {NORM: FLOAT8}, "norm1.weight is torch.float8_e4m3fn and has to be"),
    (WEIGHTS, {NORM: torch.full((64,), 1e300, dtype=torch.float64)}, "norm1.weight is .* finite"),
    (WEIGHTS, {BIAS: torch.zeros(192)}, "Wqkv.bias is .192,.; .* should be missing"),
    (WEIGHTS, thirds(64, 0, 64), "q_proj.weight has no k_proj and v_proj of the same shape"),
    (WEIGHTS, thirds(32, 96, 64), "q_proj.weight has no k_proj and v_proj of the same shape"),
    (TOKENIZER, "{}", "tokenizer.json is not a tokenizer"),
    (TOKENIZER, lambda data: data.replace(b"[MASK]", b"MASK"), "has to have the tokens .* .M"),
    (TOKENIZER, {"post_processor": None}, "and to put .CLS. before a text"),
    (TOKENIZER, lambda data: data.replace(b": 100,", b": 40000,"), "has an id 40000 and"),
)
def test_a_damaged_checkpoint_is_an_error_of_one_line(directory, name, change, message):
    damage(directory / name, change)
    with refused(f"model.*{message}"):
        NomicBert.from_pretrained(directory)


ROPE = {"rope_theta": 1000.0, "rope_type": "dynamic", "factor": 2.0}
NAMES_OF_FIELDS = [name for names, *_ in checkpoint.FIELDS.values() for name in names]
ROWS = [(name, value) for name in NAMES_OF_FIELDS for value in (True, "2", NAN, -1, 10**400)]
ROWS += [("hidden_size", 64.0), ("hidden_size", 66), ("num_attention_heads", 384)]  # 64.0: no int
ROWS += [("vocab_size", None), ("factor", None), ("rope_theta", 0.5), ("rope_type", "yarn")]
ROWS += [("model_type", "bert"), ("prenorm", True), ("rope_scaling", ROPE)]
ROWS += [("partial_rotary_factor", 0.5)]
ROWS += [("rope_parameters", value) for value in ([], "", {"rope_type": "dynamic"})]


@cases("name, value", ROWS)
def test_a_field_of_another_type_or_out_of_range_is_named(tmp_path, name, value):
    more = {"rope_scaling": None, "rope_parameters": ROPE, "max_position_embeddings": 2048}
    damage(tmp_path / CONFIG, json.dumps(native := vars(ModelConfig()) | more))
    if name in (*PUBLISHED, *NAMES, "max_trained_positions") and name not in native:
        publish(tmp_path)
    checkpoint.read_config(tmp_path)
    change = {"rope_parameters": ROPE | {name: value}} if name in ROPE else {name: value}
    damage(tmp_path / CONFIG, change)
    with refused(r"config.json: \w+ is .{1,200}; it has to "):
        checkpoint.read_config(tmp_path)


def test_a_tokenizer_or_a_factor_that_does_not_fit_the_model_is_refused(directory, tokenizer):
    for factor in (0.5, NAN):
        with refused("rope_factor=.*: give a number from 1 to 1000"):
            NomicBert.from_pretrained(directory, rope_factor=factor)
    for vocab_size in (64, 4096):
        tiny_model(tokenizer, vocab_size=vocab_size).save_pretrained(directory)
        with refused(f"tokens, vocab_size in .* is {vocab_size}: it should be"):
            NomicBert.from_pretrained(directory)


def test_code_beside_safetensors_is_never_executed(directory):
    """Whoever opens this pickle, or imports this module, makes a folder."""
    folder = str(directory / "executed")
    program = type("Program", (), {"__reduce__": lambda self: (os.mkdir, (folder,))})()
    torch.save(program, directory / "pytorch_model.bin")
    (directory / "modeling_hf_nomic_bert.py").write_text(f"import os; os.mkdir({folder!r})")
    v1(directory)  # its auto_map names that module
    NomicBert.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    with refused("a pickle .* is not opened"):
        NomicBert.from_pretrained(directory)
    assert not (directory / "executed").exists()
