"""A model directory opens in each form in which the model is published, or says what is amiss."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from model import NomicBert, NomicBertForMaskedLM
from options import InputError

TEXTS = ["", "some words", "a much longer text " * 60]

# ------------------------------------------------------------------------------------------------
# What published directories look like, written from one of ours


def shape(directory):
    return json.loads((directory / "config.json").read_text())


def published_config(native, **more):
    """config.json with GPT-2's names, as it came with nomic-bert-2048 and nomic-embed-text."""
    return {
        "activation_function": "swiglu",
        "architectures": ["NomicBertModel"],
        "auto_map": {"AutoModel": "modeling_hf_nomic_bert.NomicBertModel"},
        "attn_pdrop": 0.0,
        "causal": False,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-12,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "model_type": "nomic_bert",
        "n_embd": native["hidden_size"],
        "n_head": native["num_attention_heads"],
        "n_inner": native["intermediate_size"],
        "n_layer": native["num_hidden_layers"],
        "n_positions": 8192,
        "pad_vocab_size_multiple": 64,
        "prenorm": False,
        "qkv_proj_bias": False,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "type_vocab_size": 2,
        "use_rms_norm": False,
        "vocab_size": native["vocab_size"],
        **more,
    }


def v1(directory, **more):
    """nomic-embed-text-v1: does not say that it was trained at 2,048; it reads up to 8,192."""
    config = published_config(shape(directory), max_position_embeddings=8192, **more)
    (directory / "config.json").write_text(json.dumps(config))


def v1_5(directory):
    """nomic-embed-text-v1.5: says that it was trained at 2,048."""
    config = published_config(shape(directory), max_trained_positions=2048)
    (directory / "config.json").write_text(json.dumps(config))


def v1_5_of_today(directory):
    """nomic-embed-text-v1.5 since transformers has the model: both dialects in one file."""
    config = published_config(shape(directory), **shape(directory), max_trained_positions=2048)
    config["rope_parameters"] = {"rope_theta": 1000.0, "rope_type": "default"}
    (directory / "config.json").write_text(json.dumps(config))


def nomic_bert_2048(directory):
    """The masked language model: everything under bert., a head, and the decoder stored as well."""
    config = published_config(shape(directory), n_positions=2048, rotary_scaling_factor=2)
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    size = config["n_embd"]
    weights = {f"bert.{name}": weight for name, weight in weights.items()}
    weights |= {
        "cls.predictions.transform.dense.weight": torch.eye(size),
        "cls.predictions.transform.layer_norm.weight": torch.ones(size),
        "cls.predictions.transform.layer_norm.bias": torch.zeros(size),
        "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"].clone(),
    }
    save_file(weights, directory / "model.safetensors")


def in_half_precision(directory):
    weights = load_file(directory / "model.safetensors")
    half = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_file(half, directory / "model.safetensors")


def of_a_trainer(directory):
    """Out of the released training code: everything under trunk., buffers among the weights."""
    weights = load_file(directory / "model.safetensors")
    weights = {f"trunk.{name}": weight for name, weight in weights.items()}
    weights["trunk.encoder.layers.0.attn.rotary_emb.inv_freq"] = torch.ones(16)
    weights["trunk.embeddings.position_ids"] = torch.arange(512)
    save_file(weights, directory / "model.safetensors")


@pytest.fixture
def directory(tokenizer, tmp_path):
    """A checkpoint of ours, trained at 2,048 tokens."""
    tiny_model(tokenizer, trained_length=2048).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def embeddings(directory, **options):
    return NomicBert.from_pretrained(directory, dtype=torch.float32, **options).encode(TEXTS)


@pytest.mark.parametrize(
    "variant", [v1, v1_5, v1_5_of_today, nomic_bert_2048, of_a_trainer], ids=lambda f: f.__name__
)
def test_every_published_variant_gives_the_same_embeddings(directory, variant):
    expected = embeddings(directory)
    variant(directory)
    np.testing.assert_array_equal(embeddings(directory), expected)
    config = NomicBert.from_pretrained(directory).config
    assert (config.rope_base, config.trained_length) == (1000.0, 2048)
    assert config.layer_norm_eps == 1e-12


def test_weights_in_half_precision_open_as_float32(directory):
    expected = embeddings(directory)
    in_half_precision(directory)
    model = NomicBert.from_pretrained(directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.encode(TEXTS) * expected).sum(1).min() > 0.999


def test_published_files_leave_dynamic_ntk_open_and_an_argument_turns_it_on(directory):
    v1(directory)
    assert NomicBert.from_pretrained(directory).rope.scaling == "none"
    scaled = NomicBert.from_pretrained(directory, rope_factor=2.0).rope
    assert (scaled.scaling, scaled.factor, scaled.trained_length) == ("dynamic", 2.0, 2048)


def test_a_published_factor_means_dynamic_ntk(directory):
    v1(directory, rotary_scaling_factor=2)
    rope = NomicBert.from_pretrained(directory).rope
    assert (rope.scaling, rope.factor, rope.trained_length) == ("dynamic", 2.0, 2048)


def test_rope_factor_changes_texts_beyond_the_trained_length_only(directory):
    model = NomicBert.from_pretrained(directory, torch.float32, rope_factor=1.0)
    other = NomicBert.from_pretrained(directory, torch.float32, rope_factor=4.0)
    short, long = ["word " * 100], ["word word a b " * 800]
    np.testing.assert_array_equal(model.encode(short), other.encode(short))
    assert abs(model.encode(long) - other.encode(long)).max() > 1e-4


def test_vocabularies_are_padded_as_config_json_says(directory):
    config = shape(directory)
    v1(directory, vocab_size=config["vocab_size"] - 3)
    assert NomicBert.from_pretrained(directory).config.vocab_size == config["vocab_size"]


def test_the_head_of_a_published_masked_language_model_opens(directory):
    nomic_bert_2048(directory)
    model = NomicBertForMaskedLM.from_pretrained(directory)
    words = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is words, "tied: one parameter, not two equal ones"
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(weight.numel() for weight in load_file(directory / "model.safetensors").values())
        - words.numel()
    )


def test_a_checkpoint_without_tokenizer_opens_but_does_not_encode(directory):
    (directory / "tokenizer.json").unlink()
    model = NomicBert.from_pretrained(directory)
    with pytest.raises(InputError, match="no tokenizer.json beside the model"):
        model.encode(["words"])


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
    written = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(written) >= 7
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_encoder_of_a_masked_language_model_opens_without_its_head(tokenizer, tmp_path):
    model = tiny_model(tokenizer, NomicBertForMaskedLM)
    model.save_pretrained(tmp_path)
    encoder = NomicBert.from_pretrained(tmp_path)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, model.bert.state_dict()[name])
    with pytest.raises(InputError, match="has no MLM head"):
        encoder.save_pretrained(tmp_path)
        NomicBertForMaskedLM.from_pretrained(tmp_path)


def test_every_scaling_of_rope_is_kept(tokenizer, tmp_path):
    """Static NTK as the larger base that it is."""
    text = ["some words " * 200]
    for scaling in ("none", "linear", "ntk", "dynamic"):
        model = tiny_model(tokenizer, rope_scaling=scaling, rope_factor=3.0)
        model.save_pretrained(tmp_path)
        again = NomicBert.from_pretrained(tmp_path, dtype=torch.float32)
        np.testing.assert_allclose(again.encode(text), model.encode(text), atol=1e-6)


# ------------------------------------------------------------------------------------------------
# The hub: the real download code, on a cache laid out as huggingface_hub lays it out


def test_a_name_on_the_hub_opens_from_its_cache(directory, tmp_path):
    repository = tmp_path / "cache" / "models--nomic-ai--nomic-embed-text-v1"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    v1(directory)
    snapshot.parent.mkdir()
    directory.rename(snapshot)
    code = (
        "import torch; from model import NomicBert\n"
        "model = NomicBert.from_pretrained('nomic-ai/nomic-embed-text-v1', torch.float32)\n"
        "print(model.encode(['some words'])[0, :4].tolist())"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = NomicBert.from_pretrained(snapshot, torch.float32).encode(["some words"])[0, :4]
    np.testing.assert_allclose(json.loads(result.stdout), expected, atol=1e-6)


def test_a_name_that_the_hub_does_not_give_is_one_line():
    code = "from model import NomicBert; from options import run\n"
    code += "run(lambda _: NomicBert.from_pretrained('nobody/nothing'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "no directory nobody/nothing here" in result.stderr


# ------------------------------------------------------------------------------------------------
# What is amiss, in one line that names the file and the field


def change(name, old, new):
    def damage(directory):
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new))

    return damage


def with_config(**fields):
    def damage(directory):
        (directory / "config.json").write_text(json.dumps(shape(directory) | fields))

    return damage


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_weights(edit):
    def damage(directory):
        weights = load_file(directory / "model.safetensors")
        edit(weights)
        save_file(weights, directory / "model.safetensors")

    return damage


def pickled(directory):
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")


LAYER = "encoder.layers.1.norm1.weight"
YARN = {"rope_theta": 1000.0, "rope_type": "yarn", "factor": 4.0}
BAD = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read: No such"),
    "no object": (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "another model": (with_config(model_type="bert"), "config.json: model_type is 'bert', not"),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        "model.safetensors cannot be read",
    ),
    "cut short": (truncate, "model.safetensors cannot be read: .*"),
    "another width": (
        with_config(intermediate_size=256),
        "fc11.weight is .128, 64., config.json asks for .256, 64.: see .intermediate_size",
    ),
    "more words": (with_config(vocab_size=512), "word_embeddings.weight is .* see \\(vocab_size"),
    "more layers": (
        with_config(num_hidden_layers=3),
        "has 2 layers, num_hidden_layers in config.json is 3",
    ),
    "a weight too few": (with_weights(lambda w: w.pop(LAYER)), f"{LAYER} is missing"),
    "a weight too many": (
        with_weights(lambda w: w.update({"encoder.layers.0.attn.Wqkv.bias": torch.zeros(192)})),
        "Wqkv.bias is \\(192,\\), config.json asks for missing",
    ),
    "whole numbers": (
        with_weights(lambda w: w.update({LAYER: torch.ones(64, dtype=torch.int8)})),
        "norm1.weight is of torch.int8",
    ),
    "no number": (with_config(hidden_size="64"), "hidden_size is '64', not a positive number"),
    "odd heads": (with_config(num_attention_heads=5), "hidden_size 64 makes no 5 even heads"),
    "unknown RoPE": (with_config(rope_parameters=YARN), "rope_type is 'yarn'; known are default"),
    "no RoPE factor": (
        with_config(rope_parameters=YARN | {"rope_type": "dynamic", "factor": None}),
        "config.json: factor is None",
    ),
    "experts": (
        with_config(moe_every_n_layers=2),
        "moe_every_n_layers is 2; this model has 0 only",
    ),
    "pre-norm": (with_config(prenorm=True), "prenorm is True; this model has False only"),
    "another pooling": (
        change("1_Pooling/config.json", "mean_tokens", "cls_token"),
        "1_Pooling/config.json: .*pooling_mode_cls_token.*takes the mean",
    ),
    "a pickle": (pickled, "pytorch_model.bin and no model.safetensors: a pickle is a program"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_amiss_is_said_in_one_line(directory, name):
    damage, message = BAD[name]
    damage(directory)
    with pytest.raises(InputError, match=message) as error:
        NomicBert.from_pretrained(directory)
    assert "\n" not in str(error.value) and "model" in str(error.value)


@pytest.mark.parametrize("variant", [None, v1, v1_5_of_today])
def test_any_value_in_config_json_opens_or_is_an_error_of_one_line(directory, variant):
    """Each field in turn missing, and of every wrong type: never a traceback, never a long wait."""
    if variant:
        variant(directory)
    config = shape(directory)
    for name in config:
        others = {key: value for key, value in config.items() if key != name}
        for value in (
            "gone",
            None,
            "x",
            -1,
            0,
            1.5,
            10**9,
            True,
            [],
            [1],
            {},
            {"a": 1},
            float("nan"),
        ):
            broken = others if value == "gone" else others | {name: value}
            (directory / "config.json").write_text(json.dumps(broken))
            try:
                NomicBert.from_pretrained(directory)
            except InputError as error:
                assert "\n" not in str(error)


def test_a_tokenizer_of_another_model_is_refused(directory, data_tokenizer):
    data_tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(
        InputError, match="tokenizer.json has 2048 tokens, vocab_size in config.json"
    ):
        NomicBert.from_pretrained(directory)


def test_a_vocabulary_larger_than_the_tokenizers_is_refused(directory, data_tokenizer):
    tiny_model(data_tokenizer, vocab_size=4096).save_pretrained(directory)
    with pytest.raises(InputError, match="has 2048 tokens, vocab_size in config.json is 4096"):
        NomicBert.from_pretrained(directory)


def test_a_pickle_beside_safetensors_is_never_opened(directory):
    """Whoever unpickles this file makes a folder."""

    class Program:
        def __reduce__(self):
            return os.mkdir, (str(directory / "executed"),)

    torch.save(Program(), directory / "pytorch_model.bin")
    (directory / "modeling.py").write_text(f"import os; os.mkdir({str(directory / 'executed')!r})")
    v1(directory)  # its auto_map names a file of code
    NomicBert.from_pretrained(directory)
    assert not (directory / "executed").exists()
    with pytest.raises(Exception, match="[Ww]eights.only"):  # so do our own resumes read state.pt
        torch.load(directory / "pytorch_model.bin", weights_only=True)
    assert not (directory / "executed").exists()


def test_no_file_opens_a_pickle_without_weights_only():
    calls = [
        line
        for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("bench/*.py"))
        for line in path.read_text().splitlines()
        if "torch.load(" in line or "pickle.load" in line or "trust_remote_code=True" in line
    ]
    assert calls and all("weights_only=True" in line for line in calls)
