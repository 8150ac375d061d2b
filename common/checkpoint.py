"""A checkpoint is a model directory, read in every form in which the model is published.

    config.json         the shape. Two dialects: the published one has the names of GPT-2 (n_embd),
                        transformers' own NomicBert has others (hidden_size)
    model.safetensors   the weights, under the published names or transformers' own, with or without
                        the MLM head
    tokenizer.json      text -> token ids
    modules.json, ...   for SentenceTransformer: how an embedding is made from hidden states

Directories are written in the dialect of transformers. Nothing in a directory is ever executed:
JSON and safetensors hold values, while a pickle (.bin, .pt) is a program that runs when it is
opened, and is refused.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.files import load_tokenizer, read_json, write_json, write_whole
from common.options import InputError

MAX_TOKENS = 8192  # `encode` and SentenceTransformer truncate texts there (sec. 5.2.4)


def find_checkpoint(where):
    """The directory of a checkpoint: `where` itself, or what the hub has under that name, which is
    downloaded once into huggingface_hub's cache.

    Raises InputError where there is no such directory, nor such a name on the hub."""
    if Path(where).is_dir():
        return Path(where)
    if not re.fullmatch(r"\w[\w-]*/\w[\w.-]*", str(where)) or Path(where).parent.exists():
        raise InputError(f"there is no checkpoint directory {where}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), allow_patterns=["*.json", "model.safetensors"]))
    except Exception as error:  # no network, no such name, no access: many types
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"no directory {where} here, and none from the hub: {reason}") from None


# ------------------------------------------------------------------------------------------------
# config.json

NAMES = {  # our name -> the names in config.json: transformers', the published one
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "type_vocab_size": ("type_vocab_size",),
    "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon"),
}
REQUIRED = {  # other models of this type have other values, which model.py does not implement
    "activation_function": "swiglu",
    "hidden_act": "silu",
    "prenorm": False,
    "causal": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
}
ROPE_TYPES = {"default": "none", "linear": "linear", "dynamic": "dynamic"}  # config.json's -> ours


def read_config(directory):
    """The fields of model.ModelConfig, from either dialect. Raises InputError naming the field."""
    path = directory / "config.json"
    config = read_json(path)

    def number(names, values=config):
        value = next((values[name] for name in names if name in values), None)
        if not isinstance(value, (int, float)):
            raise InputError(f"{path}: {names[0]} is {value!r}, not a number")
        return value

    for name, value in {"model_type": "nomic_bert", **REQUIRED}.items():
        if config.get(name, value) != value:
            raise InputError(f"{path}: {name} is {config[name]!r}; this model has {value!r} only")
    values = {ours: number(names) for ours, names in NAMES.items()}
    rope = config.get("rope_parameters")
    if not rope:  # the published dialect: a factor means Dynamic NTK
        factor = config.get("rotary_scaling_factor")
        rope = {"rope_type": "dynamic" if factor else "default", "factor": factor}
        rope["rope_theta"] = config.get("rotary_emb_base", 1000.0)
    kind = rope.get("rope_type")
    if kind not in ROPE_TYPES:
        raise InputError(f"{path}: rope_type is {kind!r}; known are {', '.join(ROPE_TYPES)}")
    values["rope_scaling"] = ROPE_TYPES[kind]
    values["rope_base"] = float(number(["rope_theta"], rope))
    if kind != "default":
        values["rope_factor"] = float(number(["factor"], rope))
    if "rotary_emb_base" in config:  # the published dialect; v1 does not say how it was trained
        values["trained_length"] = config.get("max_trained_positions", 2048)
    else:
        values["trained_length"] = number(["max_position_embeddings"])
    return values


# ------------------------------------------------------------------------------------------------
# model.safetensors

PREFIX = r"^(bert|nomic_bert)\."  # of the encoder beside a head: published, transformers'
RENAMED = {  # transformers' names inside its modules -> the published ones, which are ours
    r"^layers\.": "encoder.layers.",
    r"^embeddings\.LayerNorm\.": "emb_ln.",
    r"\.self_attn\.o_proj\.": ".attn.out_proj.",
    r"\.mlp\.up_proj\.": ".mlp.fc11.",
    r"\.mlp\.gate_proj\.": ".mlp.fc12.",
    r"\.mlp\.down_proj\.": ".mlp.fc2.",
    r"\.post_attention_layernorm\.": ".norm1.",
    r"\.post_mlp_layernorm\.": ".norm2.",
}
UNUSED = r"^pooler\.|inv_freq$"


def read_weights(directory):
    """name -> weight, by the published names without prefix; the MLM head's begin with cls.

    Weights are in PyTorch's default type: float32. Raises InputError for a damaged file, a pickle
    instead of safetensors, and weights that are not finite."""
    path = directory / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"{path} is missing; a pickle (.bin, .pt) is not opened, since that would run the "
            "program in it"
        )
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    weights = {}
    for name, weight in stored.items():
        name = re.sub(PREFIX, "", name)
        for pattern, ours in RENAMED.items():
            name = re.sub(pattern, ours, name)
        if not weight.is_floating_point() or not weight.isfinite().all():
            raise InputError(f"{path}: {name} is {weight.dtype} and has to be finite floats")
        if not re.search(UNUSED, name):
            weights[name] = weight.to(torch.get_default_dtype(), copy=True)  # memory of its own
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        weights[name.replace("self_attn.q_proj", "attn.Wqkv")] = torch.cat(parts)
    return weights


def check_weights(expected, weights, directory):
    """Raises InputError unless `weights` has the names and shapes of `expected` (a state_dict)."""
    for name in {**expected, **weights}:
        found, wanted = (
            tuple(tensors[name].shape) if name in tensors else "missing"
            for tensors in (weights, expected)
        )
        if found != wanted:
            path = directory / "model.safetensors"
            raise InputError(f"{path}: {name} is {found}, config.json asks for {wanted}")


def read_head(head, weights, directory):
    """The weights of the MLM head, ready to load. transformers' head has biases: zeros are dropped.

    Raises InputError for a missing head, other biases, and a last matrix that is not tied."""
    if not head:
        raise InputError(f"{directory} has no MLM head: it is not a checkpoint of stage 1")
    ends = ("dense.bias", "decoder.bias", "predictions.bias")
    biases = [name for name in head if name.endswith(ends)]
    if any([head.pop(name).any() for name in biases]):
        raise InputError(f"{directory}: its MLM head has biases, and that of this model has none")
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


def check_pooling(directory):
    """Raises InputError where texts are pooled in another way than by the mean of their tokens."""
    path = directory / "1_Pooling" / "config.json"
    pooling = read_json(path) if path.is_file() else {}
    modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on}
    modes.add(pooling.get("pooling_mode", "mean"))
    if modes - {"mean", "pooling_mode_mean_tokens"}:
        raise InputError(f"{path}: {pooling}; this model takes the mean of all tokens")


# ------------------------------------------------------------------------------------------------
# Writing


def write_checkpoint(directory, config, weights, tokenizer, architecture, prompts):
    """Writes a directory that AutoModel and SentenceTransformer open; the weights come last.

    config: the fields of model.ModelConfig; weights: a state_dict; architecture: the class of
    transformers that the weights are of; prompts: task -> prefix."""
    directory, hidden_size = Path(directory), config["hidden_size"]
    rope = {"rope_theta": config["rope_base"]}
    rope["rope_type"] = {v: k for k, v in ROPE_TYPES.items()}[config["rope_scaling"]]
    if config["rope_scaling"] != "none":
        rope["factor"] = config["rope_factor"]
    files = {
        "config.json": {
            "model_type": "nomic_bert",
            "architectures": [architecture],
            **{name: config[name] for name in NAMES},
            "max_position_embeddings": config["trained_length"],
            "rope_parameters": rope,
            "hidden_act": "silu",
            "pad_token_id": 0,
        },
        "modules.json": [
            {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else ""}
            | {"type": f"sentence_transformers.models.{name}"}
            for i, name in enumerate(("Transformer", "Pooling", "Normalize"))
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden_size,
            "pooling_mode_mean_tokens": True,
        },
        "sentence_bert_config.json": {"max_seq_length": MAX_TOKENS},
        "config_sentence_transformers.json": {"prompts": prompts},
    }
    if tokenizer:
        write_whole(directory / "tokenizer.json", lambda path: tokenizer.save(str(path)))
        special = {f"{x}_token": f"[{x.upper()}]" for x in ("pad", "unk", "cls", "sep", "mask")}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
        files["tokenizer_config.json"] = settings | special
    for name, content in files.items():
        write_json(directory / name, content)
    stored = {}
    for name, weight in weights.items():
        weight = weight.detach().to("cpu", torch.float32).contiguous()
        stored[re.sub(r"^bert\.", "nomic_bert.", name)] = weight
    if stored.pop("cls.predictions.decoder.weight", None) is not None:  # tied: stored once
        stored["cls.predictions.transform.dense.bias"] = torch.zeros(hidden_size)
        stored["cls.predictions.bias"] = torch.zeros(config["vocab_size"])
    path = directory / "model.safetensors"
    write_whole(path, lambda temporary: save_file(stored, temporary, {"format": "pt"}))
