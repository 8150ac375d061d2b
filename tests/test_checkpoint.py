"""A model directory opens in each form that the model is published in, or one line says why not."""

import filecmp
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


PUBLISHED = """
    "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0,
    "auto_map": {"AutoModel": "modeling_hf_nomic_bert.NomicBertModel"}, "causal": false,
    "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-12, "mlp_fc1_bias": false, "mlp_fc2_bias": false,
    "model_type": "nomic_bert", "n_positions": 8192, "pad_vocab_size_multiple": 64,
    "prenorm": false, "qkv_proj_bias": false, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": false, "rotary_emb_scale_base": null, "rotary_scaling_factor": null,
    "type_vocab_size": 2, "use_rms_norm": false"""
NAMES = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "vocab_size": "vocab_size"}
NAMES |= {"n_inner": "intermediate_size", "n_layer": "num_hidden_layers"}


def read_config(directory):
    return json.loads((directory / "config.json").read_text())


def write_config(directory, config):
    (directory / "config.json").write_text(json.dumps(config))


def publish(directory, **more):
    """config.json with GPT-2's names, as it came with nomic-bert-2048 and nomic-embed-text."""
    native = read_config(directory)
    shape = {published: native[ours] for published, ours in NAMES.items()}
    write_config(directory, {**json.loads(f"{{{PUBLISHED}}}"), **shape, **more})


def edit_weights(directory, edit):
    """edit: a dictionary of weights -> another one."""
    path = directory / "model.safetensors"
    save_file(edit(load_file(path)), path)


def v1(directory, **more):
    """nomic-embed-text-v1: does not say that it was trained at 2,048; it reads up to 8,192."""
    publish(directory, **{"max_position_embeddings": 8192, **more})


def v1_5(directory):
    """nomic-embed-text-v1.5: says that it was trained at 2,048."""
    publish(directory, max_trained_positions=2048)


def v1_5_of_today(directory):
    """nomic-embed-text-v1.5 since transformers has the model: both dialects in one file."""
    rope = {"rope_theta": 1000.0, "rope_type": "default"}
    native = read_config(directory) | {"rope_parameters": rope}
    publish(directory, **native, max_trained_positions=2048)


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


def trainer_output(directory):
    """Out of the released training code: everything under trunk., buffers among the weights."""
    buffers = {"trunk.encoder.layers.0.attn.rotary_emb.inv_freq": torch.ones(16)}
    buffers |= {"trunk.embeddings.position_ids": torch.arange(512)}
    edit_weights(directory, lambda w: {f"trunk.{name}": w[name] for name in w} | buffers)


@pytest.fixture
def directory(tokenizer, tmp_path):
    """A checkpoint of ours, trained at 2,048 tokens."""
    tiny_model(tokenizer, trained_length=2048).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def embeddings(directory):
    return NomicBert.from_pretrained(directory, dtype=torch.float32).encode(TEXTS)


@pytest.mark.parametrize("variant", [v1, v1_5, v1_5_of_today, nomic_bert_2048, trainer_output])
def test_every_published_variant_gives_the_same_embeddings(directory, variant):
    expected = embeddings(directory)
    variant(directory)
    np.testing.assert_array_equal(embeddings(directory), expected)
    config = NomicBert.from_pretrained(directory).config
    assert (config.rope_base, config.trained_length) == (1000.0, 2048)
    assert config.layer_norm_eps == 1e-12


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


def test_vocabularies_are_padded_as_config_json_says(directory):
    size = read_config(directory)["vocab_size"]
    v1(directory, vocab_size=size - 3)
    assert NomicBert.from_pretrained(directory).config.vocab_size == size


def test_a_checkpoint_without_tokenizer_opens_but_does_not_encode(directory):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer.json beside the model"):
        NomicBert.from_pretrained(directory).encode(["words"])


# ------------------------------------------------------------------------------------------------
# Ours -> ours


@pytest.mark.parametrize("cls", [NomicBert, NomicBertForMaskedLM])
def test_saved_and_opened_again_is_equal_bit_for_bit(tokenizer, tmp_path, cls):
    model = tiny_model(tokenizer, cls)
    model.save_pretrained(tmp_path / "a")
    again = cls.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert again.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    again.save_pretrained(tmp_path / "b")
    written = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    _, different, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", written, shallow=False)
    assert len(written) >= 7 and not different and not errors


def test_the_encoder_of_a_masked_language_model_opens_without_its_head(tokenizer, tmp_path):
    model = tiny_model(tokenizer, NomicBertForMaskedLM)
    model.save_pretrained(tmp_path / "masked")
    encoder = NomicBert.from_pretrained(tmp_path / "masked")
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name])
    again = NomicBertForMaskedLM.from_pretrained(tmp_path / "masked")
    words = again.bert.embeddings.word_embeddings.weight
    assert again.cls.predictions.decoder.weight is words, "tied"
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match="has no MLM head"):
        NomicBertForMaskedLM.from_pretrained(tmp_path / "encoder")


@pytest.mark.parametrize("scaling", ["none", "linear", "dynamic"])
def test_the_scaling_of_rope_is_kept(tokenizer, tmp_path, scaling):
    model = tiny_model(tokenizer, rope_scaling=scaling, rope_factor=3.0)
    model.save_pretrained(tmp_path)
    again = NomicBert.from_pretrained(tmp_path, dtype=torch.float32)
    text = ["some words " * 200]
    np.testing.assert_allclose(again.encode(text), model.encode(text), atol=1e-6)


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


CONFIG, WEIGHTS = "config.json", "model.safetensors"
YARN = {"rope_theta": 1000.0, "rope_type": "yarn", "factor": 4.0}
NO_FACTOR = {"rope_theta": 1000.0, "rope_type": "dynamic", "factor": None}
NORM, BIAS = "encoder.layers.1.norm1.weight", "encoder.layers.0.attn.Wqkv.bias"


@cases(
    ("name", "change", "message"),
    [
        (CONFIG, None, "config.json cannot be read: No such"),
        (CONFIG, "[]", "config.json holds a list"),
        (CONFIG, "{", "config.json is not JSON"),
        (CONFIG, {"model_type": "bert"}, "config.json: model_type is 'bert', not"),
        (CONFIG, {"hidden_size": "64"}, "hidden_size is '64', not a number from 0 to"),
        (CONFIG, {"hidden_size": 10**30}, "hidden_size is 10*, not a number from 0 to"),
        (CONFIG, {"num_attention_heads": 5}, "hidden_size 64 does not make 5 even heads"),
        (CONFIG, {"rope_parameters": YARN}, "rope_type is 'yarn'; known are default"),
        (CONFIG, {"rope_parameters": NO_FACTOR}, "config.json: factor is None"),
        (CONFIG, {"moe_every_n_layers": 2}, "moe_every_n_layers is 2; this model has 0 only"),
        (CONFIG, {"prenorm": True}, "prenorm is True; this model has False only"),
        (CONFIG, {"vocab_size": 512}, "word_embeddings.weight is .* asks for .512"),
        (CONFIG, {"intermediate_size": 256}, "fc11.weight is .128, 64., .* asks for .256, 64"),
        (CONFIG, {"num_hidden_layers": 3}, "has 2 layers, config.json asks for 3"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "takes the mean of all tokens"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean"]}, "takes the mean of all tokens"),
        ("1_Pooling/config.json", "[]", "config.json holds a list"),
        ("modules.json", lambda data: b"\xff", "modules.json cannot be read"),
        (WEIGHTS, None, "model.safetensors cannot be read"),
        (WEIGHTS, lambda data: data[:-100], "model.safetensors cannot be read"),
        (WEIGHTS, {NORM: None}, "norm1.weight is missing"),
        (WEIGHTS, {NORM: torch.ones(64, dtype=torch.int8)}, "norm1.weight is torch.int8"),
        (WEIGHTS, {NORM: torch.full((64,), torch.nan)}, "norm1.weight is .* finite"),
        (WEIGHTS, {BIAS: torch.zeros(192)}, "Wqkv.bias is .192,., .* asks for missing"),
        (WEIGHTS, {"bert.emb_ln.bias": torch.ones(64)}, "emb_ln.bias is there twice"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_of_one_line(directory, name, change, message):
    damage(directory / name, change)
    with pytest.raises(InputError, match=message) as error:
        NomicBert.from_pretrained(directory)
    assert "\n" not in str(error.value) and "model" in str(error.value)


@pytest.mark.parametrize("variant", [None, v1_5_of_today])
def test_any_value_in_config_json_opens_or_is_an_error_of_one_line(directory, variant):
    """Each field in turn missing, and of every wrong type: never a traceback, never a long wait."""
    if variant:
        variant(directory)
    config = read_config(directory)
    bad = ("missing", None, "x", -1, 0, 1.5, 10**9, True, [], [1], {}, {"a": 1}, float("nan"))
    for name in config:
        for value in bad:
            changed = {**config, name: value}
            write_config(directory, {k: v for k, v in changed.items() if v != "missing"})
            try:
                NomicBert.from_pretrained(directory)
            except InputError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("vocab_size", [320, 4096])
def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(
    tmp_path, data_tokenizer, vocab_size
):
    tiny_model(data_tokenizer, vocab_size=vocab_size).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"has 2048 tokens, vocab_size in .* is {vocab_size}"):
        NomicBert.from_pretrained(tmp_path)


def edited_tokenizer(edit):
    def change(data):
        values = json.loads(data)
        edit(values)
        return json.dumps(values).encode()

    return change


def without(token):
    def edit(values):
        values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != token]
        ids = values["model"]["vocab"]
        last = max(ids, key=ids.get)
        ids[last] = ids.pop(token)  # no hole

    return edit


def with_a_hole(values):
    ids = values["model"]["vocab"]
    ids[max(ids, key=ids.get)] += 7


@cases(
    ("edit", "message"),
    [
        (without("[MASK]"), "tokenizer.json has no token .MASK"),
        (without("[PAD]"), "tokenizer.json has no token .PAD"),
        (with_a_hole, "tokenizer.json: the ids of its tokens are not 0 to"),
        (lambda values: values.update(post_processor=None), "does not put .CLS. before a text"),
    ],
)
def test_a_tokenizer_that_training_could_not_use_is_refused(directory, edit, message):
    damage(directory / "tokenizer.json", edited_tokenizer(edit))
    with pytest.raises(InputError, match=message):
        NomicBert.from_pretrained(directory)


@cases("factor", [0.5, 0.0, -1.0, float("nan"), float("inf")])
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
    with pytest.raises(Exception, match="[Ww]eights.only"):  # as our own state.pt is read
        torch.load(directory / "pytorch_model.bin", weights_only=True)
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pytorch_model.bin and no model.safetensors: opening a p"):
        NomicBert.from_pretrained(directory)
    assert not (directory / "executed").exists()
