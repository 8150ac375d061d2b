"""A checkpoint is a model directory, read in every form in which the model is published.

    config.json         the shape. Two dialects: the published one has the names of GPT-2 (n_embd),
                        transformers' own NomicBert has others (hidden_size)
    model.safetensors   the weights, under the published names or transformers' own, with or without
                        the MLM head; large ones in shards, model-00001-of-00002.safetensors, ...
    tokenizer.json      text -> token ids
    modules.json, ...   for SentenceTransformer: how an embedding is made from hidden states

Directories are written in the dialect of transformers. Nothing in a directory is ever executed:
JSON and safetensors hold values, while a pickle (.bin, .pt) is a program that runs when it is
opened, and is refused.
"""

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.files import load_tokenizer, read_json, write_json, write_whole
from common.options import InputError

MAX_TOKENS = 8192  # `encode` and SentenceTransformer truncate texts there (sec. 5.2.4)


def find_checkpoint(where):
    """`where` itself, if that is a directory (or a file: a tokenizer.json); else the directory of
    what the hub has under that name, which is downloaded once into huggingface_hub's cache.

    Raises InputError where there is neither."""
    if Path(where).exists():
        return Path(where)
    if not re.fullmatch(r"\w[\w-]*/\w[\w.-]*", str(where)) or Path(where).parent.exists():
        raise InputError(f"there is no checkpoint directory {where}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), allow_patterns=["*.json", "model*.safetensors"]))
    except Exception as error:  # no network, no such name, no access: many types
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"no directory {where} here, and none from the hub: {reason}") from None


# ------------------------------------------------------------------------------------------------
# config.json

FIELDS = {  # our name -> its names in config.json, type, smallest and largest value
    "vocab_size": (("vocab_size",), int, 1, 10**9),
    "hidden_size": (("hidden_size", "n_embd"), int, 2, 65_536),
    "num_hidden_layers": (("num_hidden_layers", "n_layer"), int, 0, 1000),
    "num_attention_heads": (("num_attention_heads", "n_head"), int, 1, 1000),
    "intermediate_size": (("intermediate_size", "n_inner"), int, 1, 10**6),
    "type_vocab_size": (("type_vocab_size",), int, 1, 1000),
    "layer_norm_eps": (("layer_norm_eps", "layer_norm_epsilon"), float, 1e-20, 1),
    "rope_base": (("rope_theta", "rotary_emb_base"), float, 1, 10**9),
    "rope_factor": (("factor", "rotary_scaling_factor"), float, 1, 1000),
    "trained_length": (("max_trained_positions", "max_position_embeddings"), int, 1, 10**9),
}
ALLOWED = {  # the first is the default; model.py has no other
    "model_type": ["nomic_bert"],
    "activation_function": ["swiglu"],
    "hidden_act": ["silu"],
    "prenorm": [False],
    "causal": [False],
    "rotary_emb_fraction": [1.0],
    "partial_rotary_factor": [1.0],
    "rotary_emb_interleaved": [False],
    "rope_scaling": [None],  # the earlier name of rope_parameters
    "rope_type": ["default", "linear", "dynamic"],
}


def read_config(directory):
    """The fields of model.ModelConfig, from either dialect. Raises InputError naming a field that
    is missing, of another type (64.0 and true are no int), or out of range."""
    path = directory / "config.json"
    config = read_json(path)

    def refuse(name, reason):
        raise InputError(f"{path}: {name} is {config.get(name)!r:.60}; it has to be {reason}")

    rope = config.get("rope_parameters")
    if not isinstance(rope, dict | None):
        refuse("rope_parameters", "an object")
    if "rotary_emb_base" in config:  # the published dialect; v1 does not say how it was trained
        config.setdefault("max_trained_positions", 2048)
    if config.get("rotary_scaling_factor") is not None:  # published: a factor means Dynamic NTK
        config.setdefault("rope_type", "dynamic")
    config = {"rotary_emb_base": 1000.0, **config, **(rope or {})}
    for name, allowed in ALLOWED.items():
        if config.setdefault(name, allowed[0]) not in allowed:
            refuse(name, " or ".join(map(repr, allowed)))
    if config["rope_type"] == "default":
        config.setdefault("factor", 2.0)  # ModelConfig's default; nothing reads it
    values = {"rope_scaling": config["rope_type"].replace("default", "none")}
    for field, (names, kind, low, high) in FIELDS.items():
        name = next((name for name in names if name in config), names[0])
        if type(config.get(name)) not in (int, kind) or not low <= config[name] <= high:
            refuse(name, f"of type {kind.__name__}, from {low:,} to {high:,}")
        values[field] = kind(config[name])
    size, heads = values["hidden_size"], values["num_attention_heads"]
    if size % (2 * heads) or size < 4 * heads:
        reason = f"it has to make {heads} heads of even size, at least 4"
        raise InputError(f"{path}: hidden_size is {size}; {reason}")
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
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weight_files(directory):
    """model.safetensors, or its shards: model-00001-of-00002.safetensors, ... Raises InputError
    where there is neither."""
    path = directory / "model.safetensors"
    shards = sorted(directory.glob("model*.safetensors"))
    if not shards:
        reason = "a pickle (.bin, .pt) is not opened, since that would run the program in it"
        raise InputError(f"{path} is missing; {reason}")
    return [path] if path in shards else shards


def read_weights(directory):
    """name -> weight, by the published names without prefix; the MLM head's begin with cls.

    Weights are in PyTorch's default type: float32. Raises InputError for a damaged file, weights
    of 8 or fewer bits, and weights that are not finite."""
    weights = {}
    for path in weight_files(directory):
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read, is it all there? {error}") from None
        for name, weight in stored.items():
            name = re.sub(PREFIX, "", name)
            for pattern, ours in RENAMED.items():
                name = re.sub(pattern, ours, name)
            if re.search(UNUSED, name):
                continue
            if weight.dtype not in FLOATS or not weight.float().isfinite().all():
                reason = "has to be finite floats of 16 bits or more"
                raise InputError(f"{path}: {name} is {weight.dtype} and {reason}")
            weights[name] = weight.to(torch.get_default_dtype(), copy=True)  # memory of its own
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        qkv = [weights.pop(name.replace("q_proj", f"{x}_proj"), None) for x in "qkv"]
        if any(weight is None or weight.shape != qkv[0].shape for weight in qkv):
            raise InputError(f"{directory}: {name} has no k_proj and v_proj of the same shape")
        weights[name.replace("self_attn.q_proj", "attn.Wqkv")] = torch.vstack(qkv)
    return weights


def check_weights(expected, weights, directory):
    """Raises InputError unless `weights` has the names and shapes of `expected` (a state_dict)."""
    for name in {**expected, **weights}:
        shapes = [tuple(t[name].shape) if name in t else "missing" for t in (weights, expected)]
        if shapes[0] != shapes[1]:
            reason = f"{name} is {shapes[0]}; by config.json it should be {shapes[1]}"
            raise InputError(f"{directory}: {reason}")


def read_head(head, weights, directory):
    """The weights of the MLM head, ready to load. transformers' head has biases: zeros are dropped.

    Raises InputError for a missing head, other biases, and a last matrix that is not tied."""
    if not head:
        raise InputError(f"{directory} has no MLM head: it is not a checkpoint of stage 1")
    ends = ("dense.bias", "decoder.bias", "predictions.bias")
    biases = [head.pop(name) for name in list(head) if name.endswith(ends)]
    if any(bias.any() for bias in biases):
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
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = load_tokenizer(directory)
    size = tokenizer.get_vocab_size()
    if not size <= vocab_size <= math.ceil(size / 64) * 64:
        reason = f"vocab_size in config.json is {vocab_size}: it should be"
        raise InputError(f"{path} has {size} tokens, {reason} {size}, padded to a multiple of 64")
    return tokenizer


def check_pooling(directory):
    """Raises InputError where texts are pooled in another way than by the mean of their tokens."""
    path = directory / "1_Pooling" / "config.json"
    pooling = read_json(path) if path.is_file() else {}
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    modes.append(pooling.get("pooling_mode", "mean"))
    if any(mode not in ("mean", "pooling_mode_mean_tokens") for mode in modes):
        raise InputError(f"{path}: {pooling}; this model takes the mean of all tokens")


# ------------------------------------------------------------------------------------------------
# Writing


def write_checkpoint(directory, config, weights, tokenizer, architecture, prompts):
    """Writes a directory that AutoModel and SentenceTransformer open; the weights come last.

    config: the fields of model.ModelConfig; weights: a state_dict; architecture: the class of
    transformers that the weights are of; prompts: task -> prefix."""
    directory, hidden_size = Path(directory), config["hidden_size"]
    rope = {"rope_theta": config["rope_base"], "rope_type": "default"}
    if config["rope_scaling"] != "none":
        rope |= {"rope_type": config["rope_scaling"], "factor": config["rope_factor"]}
    files = {
        "config.json": {
            "model_type": "nomic_bert",
            "architectures": [architecture],
            **{name: config[name] for name, (names, *_) in FIELDS.items() if name == names[0]},
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
