"""A model directory opens in each form that the model is published in, or one line says why not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import cases, tiny_model

from common.options import InputError
from model import NomicBert, NomicBertForMaskedLM

TEXTS = ["", "some words", "a much longer text " * 60]

# ------------------------------------------------------------------------------------------------
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
    path = directory / "config.json"
    native = json.loads(path.read_text())
    shape = {published: native[ours] for published, ours in NAMES.items()}
    path.write_text(json.dumps({**(native if keep else {}), **PUBLISHED, **shape, **more}))


def edit_weights(directory, edit):
    """edit: a dictionary of weights -> another one."""
    path = directory / "model.safetensors"
    save_file(edit(load_file(path)), path)


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

    def add_head(weights):
        words = weights["embeddings.word_embeddings.weight"]
        head = {"transform.dense.weight": torch.eye(64), "decoder.weight": words.clone()}
        head |= {f"transform.layer_norm.{x}": torch.ones(64) for x in ("weight", "bias")}
        weights = {f"bert.{name}": weight for name, weight in weights.items()}
        return weights | {f"cls.predictions.{name}": weight for name, weight in head.items()}

    edit_weights(directory, add_head)


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
    edit_weights(directory, lambda w: {name: w[name].to(torch.bfloat16) for name in w})
    model = NomicBert.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.encode(TEXTS) * expected).sum(1).min() > 0.999


@pytest.mark.parametrize(
    ("factor_in_file", "argument", "expected"),
    [(None, None, ("none", 2.0)), (None, 3.0, ("dynamic", 3.0)), (2, None, ("dynamic", 2.0))],
)
def test_dynamic_ntk_is_on_where_the_file_or_the_argument_gives_a_factor(
    directory, factor_in_file, argument, expected
):
    v1(directory, rotary_scaling_factor=factor_in_file)
    rope = NomicBert.from_pretrained(directory, rope_factor=argument).rope
    assert (rope.scaling, rope.factor, rope.trained_length) == (*expected, 2048)


def test_a_checkpoint_without_tokenizer_opens_but_does_not_encode(directory):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer.json beside the model"):
        NomicBert.from_pretrained(directory).encode(["words"])


# ------------------------------------------------------------------------------------------------
# Ours -> ours


@pytest.mark.parametrize("cls", [NomicBert, NomicBertForMaskedLM])
@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic"])
def test_saved_and_opened_again_is_equal_bit_for_bit(tokenizer, tmp_path, cls, scaling):
    model = tiny_model(tokenizer, cls, rope_scaling=scaling, rope_factor=3.0)
    model.save_pretrained(tmp_path / "a")
    again = cls.from_pretrained(tmp_path / "a", dtype=torch.float32)
    found, expected = vars(again.config), vars(model.config)
    if scaling == "none":  # then config.json has no factor
        found, expected = found | {"rope_factor": None}, expected | {"rope_factor": None}
    assert found == expected
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    again.save_pretrained(tmp_path / "b")
    written = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")}
    assert len(written) >= 7
    for path in written:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_the_encoder_of_a_masked_language_model_opens_without_its_head(tokenizer, tmp_path):
    model = tiny_model(tokenizer, NomicBertForMaskedLM)
    model.save_pretrained(tmp_path / "masked")
    encoder = NomicBert.from_pretrained(tmp_path / "masked")
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name])
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match="has no MLM head"):
        NomicBertForMaskedLM.from_pretrained(tmp_path / "encoder")


def test_a_name_on_the_hub_opens_from_its_cache_or_is_an_error_of_one_line(directory, tmp_path):
    repository = tmp_path / "cache" / "models--nomic-ai--nomic-embed-text-v1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    v1(directory)
    snapshot = directory.rename(repository / "snapshots" / ("0" * 40))
    code = (
        "import torch; from model import NomicBert; from common.options import cli\n"
        "model = NomicBert.from_pretrained('nomic-ai/nomic-embed-text-v1', torch.float32)\n"
        "print(model.encode(['some words'])[0, :4].tolist())\n"
        "cli(lambda _: NomicBert.from_pretrained('nobody/nothing'))"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command, options = [sys.executable, "-c", code], {"cwd": ROOT, "env": env, "text": True}
    result = subprocess.run(command, capture_output=True, **options)
    expected = NomicBert.from_pretrained(snapshot, torch.float32).encode(["some words"])[0, :4]
    np.testing.assert_allclose(json.loads(result.stdout), expected, atol=1e-6)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "no directory nobody/nothing here" in result.stderr


# ------------------------------------------------------------------------------------------------
# What is wrong, in one line that names the file and the field


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


def edited_tokenizer(edit):
    def change(data):
        values = json.loads(data)
        edit(values)
        return json.dumps(values).encode()

    return change


def without_mask(values):
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != "[MASK]"]
    del values["model"]["vocab"]["[MASK]"]


CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
POOLING = "1_Pooling/config.json"
YARN = {"rope_theta": 1000.0, "rope_type": "yarn", "factor": 4.0}
NO_FACTOR = {"rope_theta": 1000.0, "rope_type": "dynamic"}
NORM, BIAS = "encoder.layers.1.norm1.weight", "encoder.layers.0.attn.Wqkv.bias"
NO_SPECIAL_TOKENS = edited_tokenizer(lambda values: values.update(post_processor=None))


@cases(
    ("name", "change", "message"),
    [
        (CONFIG, None, "config.json cannot be read: No such"),
        (CONFIG, "[]", "config.json holds a list"),
        (CONFIG, "{", "config.json is not JSON"),
        (CONFIG, '{"model_type": "nomic_bert"}', "config.json: vocab_size is None, not a number"),
        (CONFIG, {"model_type": "bert"}, "config.json: model_type is 'bert'; this model has 'nomi"),
        (CONFIG, {"prenorm": True}, "prenorm is True; this model has False only"),
        (CONFIG, {"rope_parameters": YARN}, "rope_type is 'yarn'; known are default"),
        (CONFIG, {"rope_parameters": NO_FACTOR}, "config.json: factor is None"),
        (CONFIG, {"vocab_size": 512}, "word_embeddings.weight is .* asks for .512"),
        (CONFIG, {"num_hidden_layers": 3}, "layers.2.* is missing, config.json asks for"),
        (POOLING, {"pooling_mode_cls_token": True}, "takes the mean of all tokens"),
        (POOLING, {"pooling_mode": "cls"}, "takes the mean of all tokens"),
        (WEIGHTS, None, "model.safetensors is missing"),
        (WEIGHTS, lambda data: data[:-100], "model.safetensors cannot be read"),
        (WEIGHTS, {NORM: None}, "norm1.weight is missing"),
        (WEIGHTS, {NORM: torch.ones(64, dtype=torch.int8)}, "norm1.weight is torch.int8"),
        (WEIGHTS, {NORM: torch.full((64,), torch.nan)}, "norm1.weight is .* finite"),
        (WEIGHTS, {BIAS: torch.zeros(192)}, "Wqkv.bias is .192,., .* asks for missing"),
        (TOKENIZER, "{}", "tokenizer.json is not a tokenizer"),
        (TOKENIZER, edited_tokenizer(without_mask), "has to have the tokens .* .MASK"),
        (TOKENIZER, NO_SPECIAL_TOKENS, "and to put .CLS. before a text"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_of_one_line(directory, name, change, message):
    damage(directory / name, change)
    with pytest.raises(InputError, match=message) as error:
        NomicBert.from_pretrained(directory)
    assert "\n" not in str(error.value) and "model" in str(error.value)


@pytest.mark.parametrize("vocab_size", [320, 4096])
def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(
    tmp_path, data_tokenizer, vocab_size
):
    tiny_model(data_tokenizer, vocab_size=vocab_size).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"has 2048 tokens, vocab_size in .* is {vocab_size}"):
        NomicBert.from_pretrained(tmp_path)


@cases("factor", [0.5, float("nan"), float("inf")])
def test_a_factor_of_dynamic_ntk_below_1_is_refused(directory, factor):
    with pytest.raises(InputError, match="rope_factor=.*: give a number from 1 to 1000"):
        NomicBert.from_pretrained(directory, rope_factor=factor)


def test_code_beside_safetensors_is_never_executed(directory):
    """Whoever opens this pickle, or imports this module, makes a folder."""
    folder = str(directory / "executed")

    class Program:
        def __reduce__(self):
            return os.mkdir, (folder,)

    torch.save(Program(), directory / "pytorch_model.bin")
    (directory / "modeling_hf_nomic_bert.py").write_text(f"import os; os.mkdir({folder!r})")
    v1(directory)  # its auto_map names that module
    NomicBert.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match="a pickle .* is not opened"):
        NomicBert.from_pretrained(directory)
    assert not (directory / "executed").exists()
