"""Opens a model directory, in every form in which the model is published.

    config.json         the shape. Two dialects: the published one has the names of GPT-2 (n_embd),
                        that of transformers' own NomicBert its own (hidden_size)
    model.safetensors   the weights, under the published names or transformers' own, with or without
                        the MLM head
    tokenizer.json      text -> token ids
    modules.json        for SentenceTransformer: how the embedding is made from the hidden states

Nothing in a directory is ever executed. JSON and safetensors hold values; a pickle (.bin, .pt) is a
program that runs when it is opened, and is refused. export.py writes such a directory.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.store import load_tokenizer
from options import InputError

MAX_TOKENS = 8192  # `encode` and SentenceTransformer cut texts there (sec. 5.2.4)
PREFIXES = {  # task -> what stands before the text (sec. 3.2)
    "query": "search_query: ",
    "document": "search_document: ",
    "classification": "classification: ",
    "clustering": "clustering: ",
}


def find(where):
    """The directory of a checkpoint: `where` itself, or what the hub has under that name, which is
    downloaded once (huggingface_hub keeps it, in ~/.cache unless told otherwise).

    Raises InputError where there is no such directory, nor such a name on the hub."""
    if Path(where).is_dir():
        return Path(where)
    if not re.fullmatch(r"\w[\w-]*/\w[\w.-]*", str(where)) or Path(where).parent.exists():
        raise InputError(f"there is no checkpoint directory {where}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), allow_patterns=["*.json", "model.safetensors"]))
    except Exception as error:  # no network, no such name, no right to it: all kinds
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"there is no directory {where} here, and the hub gave none of that name: {reason}"
        ) from None


# ------------------------------------------------------------------------------------------------
# config.json

NAMES = {  # our name -> its names in config.json: transformers', the published one
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "type_vocab_size": ("type_vocab_size",),
    "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon"),
}
ONLY = {  # what other models of this type have otherwise, and model.py does not do
    "activation_function": "swiglu",
    "hidden_act": "silu",
    "prenorm": False,
    "use_rms_norm": False,
    "causal": False,
    "parallel_block": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "moe_every_n_layers": 0,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}
ROPE_TYPES = {"default": "none", "linear": "linear", "dynamic": "dynamic"}  # config.json's -> ours


def read_json(path):
    """The object in a file. Raises InputError for a missing file, or one that holds no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, not an object")
    return values


def read_config(directory):
    """The fields of model.Config, from either dialect. Raises InputError naming the field amiss."""
    path = directory / "config.json"
    config = read_json(path)

    def number(kind, *names):
        name = next((name for name in names if config.get(name) is not None), names[0])
        value = config.get(name)
        if not isinstance(value, (int, kind)) or isinstance(value, bool) or not value > 0:
            raise InputError(f"{path}: {name} is {value!r}, not a positive number")
        return value

    if config.get("model_type") != "nomic_bert":
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}, not 'nomic_bert'")
    for name, value in ONLY.items():
        if name in config and (config[name] or None) != (value or None):
            raise InputError(f"{path}: {name} is {config[name]!r}; this model has {value!r} only")
    if config.get("n_inner", 0) is None:
        config["n_inner"] = 4 * number(int, "n_embd")  # GPT-2's default
    values = {
        ours: number(float if ours == "layer_norm_eps" else int, *names)
        for ours, names in NAMES.items()
    }
    if config.get("pad_vocab_size_multiple"):
        multiple = number(int, "pad_vocab_size_multiple")
        values["vocab_size"] = -(-values["vocab_size"] // multiple) * multiple
    heads, head_size = values["num_attention_heads"], config.get("head_dim")
    if values["hidden_size"] % (2 * heads):
        raise InputError(f"{path}: hidden_size {values['hidden_size']} makes no {heads} even heads")
    if head_size not in (None, values["hidden_size"] // heads):
        raise InputError(f"{path}: head_dim is {head_size}; this model's is hidden_size / heads")
    return values | read_rope(config, path, number)


def read_rope(config, path, number):
    """Base, scaling and trained length. In the published dialect a factor means Dynamic NTK, and
    n_positions (8,192) is how long texts may be, not how long they were in training."""
    rope = config.get("rope_parameters")
    if not rope:
        rope = {"rope_theta": config.get("rotary_emb_base", 1000.0), "rope_type": "default"}
        if config.get("rotary_scaling_factor"):
            rope |= {"rope_type": "dynamic", "factor": config["rotary_scaling_factor"]}
    if not isinstance(rope, dict) or str(rope.get("rope_type")) not in ROPE_TYPES:
        kind = rope.get("rope_type") if isinstance(rope, dict) else rope
        raise InputError(f"{path}: rope_type is {kind!r}; known are {', '.join(ROPE_TYPES)}")
    scaling = ROPE_TYPES[rope["rope_type"]]
    numbers = {"rope_theta": "rope_base"} | ({} if scaling == "none" else {"factor": "rope_factor"})
    values = {"rope_scaling": scaling}
    for name, ours in numbers.items():
        if not isinstance(rope.get(name), (int, float)) or not rope[name] > 0:
            raise InputError(f"{path}: {name} is {rope.get(name)!r}, not a positive number")
        values[ours] = float(rope[name])
    if "rotary_emb_base" in config and not config.get("max_trained_positions"):
        config["max_trained_positions"] = 2048  # v1 does not say, and means this
    length = number(int, "max_trained_positions", "max_position_embeddings")
    return values | {"trained_length": length}


# ------------------------------------------------------------------------------------------------
# model.safetensors

PREFIX = r"^(bert|nomic_bert|trunk)\."  # published with head, transformers with head, in training
RENAMED = {  # transformers' names inside its modules -> the published ones, which are ours
    r"^layers\.": "encoder.layers.",
    r"^embeddings\.LayerNorm\.": "emb_ln.",
    r"\.self_attn\.o_proj\.": ".attn.out_proj.",
    r"\.mlp\.up_proj\.": ".mlp.fc11.",
    r"\.mlp\.gate_proj\.": ".mlp.fc12.",
    r"\.mlp\.down_proj\.": ".mlp.fc2.",
    r"\.post_attention_layernorm\.": ".norm1.",
    r"\.post_mlp_layernorm\.": ".norm2.",
    r"^cls\.predictions\.bias$": "cls.predictions.decoder.bias",
}
UNUSED = r"(^|\.)(inv_freq|original_inv_freq|position_ids|token_type_ids)$|^pooler\."
FIELDS = {  # part of a weight's name -> the fields of config.json that its shape comes from
    "word_embeddings": "(vocab_size, hidden_size)",
    "token_type_embeddings": "(type_vocab_size, hidden_size)",
    "Wqkv": "(3 * hidden_size, hidden_size)",
    "fc11": "(intermediate_size, hidden_size)",
    "fc12": "(intermediate_size, hidden_size)",
    "fc2": "(hidden_size, intermediate_size)",
}


def read_weights(directory):
    """name -> float32 weight, by the published names without prefix; the MLM head's begin with cls.

    Raises InputError where there is a pickle instead of safetensors, or a damaged file."""
    path = directory / "model.safetensors"
    pickles = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if not path.is_file() and pickles:
        raise InputError(
            f"{directory} has {pickles[0]} and no model.safetensors: a pickle is a program, and "
            "opening it would run what a stranger wrote; look for the model in safetensors"
        )
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    named = {}
    for name, weight in weights.items():
        name = re.sub(PREFIX, "", name)
        for pattern, ours in RENAMED.items():
            name = re.sub(pattern, ours, name)
        if re.search(UNUSED, name):
            continue
        if not weight.is_floating_point():
            raise InputError(f"{path}: {name} is of {weight.dtype}, not of floating point")
        named[name] = weight.to(torch.float32, copy=True)  # aligned memory of its own
    for name in [name for name in named if ".self_attn.q_proj." in name]:
        parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if missing := [part for part in parts if part not in named]:
            raise InputError(f"{path}: {missing[0]} is missing")
        fused = name.replace("self_attn.q_proj", "attn.Wqkv")
        named[fused] = torch.cat([named.pop(part) for part in parts])
    return named


def build(cls, config, weights, directory):
    """A model of class cls with these weights.

    Raises InputError unless names and shapes fit exactly, before memory is taken for them."""
    where = f"{directory}/model.safetensors"
    layers = len({name.split("layers.")[1].split(".")[0] for name in weights if "layers." in name})
    if layers != config.num_hidden_layers:
        asked = config.num_hidden_layers
        raise InputError(
            f"{where} has {layers} layers, num_hidden_layers in config.json is {asked}"
        )
    try:
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
    except RuntimeError as error:  # sizes that no number of bytes holds
        raise InputError(f"{directory}/config.json: {error}") from None
    own = model.state_dict()
    for name in {**own, **weights}:
        found, wanted = (tuple(t[name].shape) if name in t else "missing" for t in (weights, own))
        if found != wanted:
            field = next(
                (f": see {shape} there" for part, shape in FIELDS.items() if part in name), ""
            )
            raise InputError(f"{where}: {name} is {found}, config.json asks for {wanted}{field}")
    model.load_state_dict(weights, assign=True)
    return model


def read_head(head, config, weights, directory):
    """The weights of the MLM head, ready to load. Biases of zeros are the same as none."""
    if not head:
        raise InputError(f"{directory} has no MLM head: it is not a checkpoint of stage 1")
    biases = [name for name in head if name.endswith(("dense.bias", "decoder.bias"))]
    config.mlm_head_bias = any(head[name].any() for name in biases)
    if not config.mlm_head_bias:
        head = {name: weight for name, weight in head.items() if name not in biases}
    words = weights.get("bert.embeddings.word_embeddings.weight")
    tied = head.setdefault("cls.predictions.decoder.weight", words)
    if words is None or not torch.equal(tied, words):
        raise InputError(f"{directory}: cls.predictions.decoder is not tied to word_embeddings")
    return head


# ------------------------------------------------------------------------------------------------
# The files beside them


def read_tokenizer(directory, vocab_size):
    """The tokenizer of a checkpoint; None where there is none, as beside transformers' models."""
    if not (directory / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(directory)
    size = tokenizer.get_vocab_size()
    if not size <= vocab_size <= -(-size // 64) * 64:
        raise InputError(
            f"{directory}/tokenizer.json has {size} tokens, vocab_size in config.json is "
            f"{vocab_size}: it should be that, padded to a multiple of 64"
        )
    return tokenizer


def read_modules(directory):
    """Whether modules.json has a LayerNorm before the unit length.

    Raises InputError where texts are pooled in another way than by the mean of all their tokens."""
    path = directory / "1_Pooling" / "config.json"
    pooling = read_json(path) if path.is_file() else {}
    modes = {mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on}
    modes.add(pooling.get("pooling_mode", "mean"))
    if modes - {"mean", "pooling_mode_mean_tokens"} or pooling.get("include_prompt") is False:
        raise InputError(f"{path}: {pooling}; this model takes the mean of all tokens")
    path = directory / "modules.json"
    return path.is_file() and "LayerNorm" in path.read_text(encoding="utf-8")
