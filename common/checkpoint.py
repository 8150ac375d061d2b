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

from common.files import load_tokenizer, read_json, read_lines, write_json, write_whole
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


def read_config(directory):
    """The fields of model.ModelConfig, from either dialect. Raises InputError naming the field."""
    path = directory / "config.json"
    config = read_json(path)

    def number(kind, *names, values=config):
        name = next((name for name in names if values.get(name) is not None), names[0])
        value = values.get(name)
        no_layers = value == 0 and name in NAMES["num_hidden_layers"]  # word vectors alone
        if type(value) not in (int, kind) or not (0 < value < 1e9 or no_layers):
            raise InputError(f"{path}: {name} is {repr(value)[:60]}, not a number from 0 to 1e9")
        return value

    if config.get("model_type") != "nomic_bert":
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}, not 'nomic_bert'")
    for name, value in REQUIRED.items():
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
    hidden_size, heads = values["hidden_size"], values["num_attention_heads"]
    too_small = hidden_size % (2 * heads) or hidden_size < 4 * heads
    if too_small or config.get("head_dim") not in (None, hidden_size // heads):
        raise InputError(f"{path}: hidden_size {hidden_size} does not make {heads} even heads")

    rope = config.get("rope_parameters")
    if not rope:  # the published dialect: a factor means Dynamic NTK
        rope = {"rope_theta": config.get("rotary_emb_base", 1000.0), "rope_type": "default"}
        if config.get("rotary_scaling_factor"):
            rope |= {"rope_type": "dynamic", "factor": config["rotary_scaling_factor"]}
    kind = isinstance(rope, dict) and rope.get("rope_type")
    if str(kind) not in ROPE_TYPES:
        raise InputError(f"{path}: rope_type is {kind!r}; known are {', '.join(ROPE_TYPES)}")
    values["rope_scaling"] = ROPE_TYPES[kind]
    values["rope_base"] = float(number(float, "rope_theta", values=rope))
    if kind != "default":
        values["rope_factor"] = float(number(float, "factor", values=rope))
    if "rotary_emb_base" in config and not config.get("max_trained_positions"):
        # n_positions (8,192) is how long texts may be; v1 does not say how long training texts were
        config["max_trained_positions"] = 2048
    names = ("max_trained_positions", "max_position_embeddings")
    return values | {"trained_length": number(int, *names)}


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


def read_weights(directory):
    """name -> weight, by the published names without prefix; the MLM head's begin with cls.

    Weights are in PyTorch's default type: float32. Raises InputError for a damaged file, a pickle
    instead of safetensors, and weights that are not finite."""
    path = directory / "model.safetensors"
    pickles = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if not path.is_file() and pickles:
        raise InputError(
            f"{directory} has {pickles[0]} and no model.safetensors: opening a pickle would run "
            "the program in it; look for the model in safetensors"
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
        if re.search(UNUSED, name):
            continue
        if name in weights:
            raise InputError(f"{path}: {name} is there twice, with and without a prefix")
        if not weight.is_floating_point() or not weight.isfinite().all():
            raise InputError(f"{path}: {name} is {weight.dtype} and has to be finite floats")
        weights[name] = weight.to(torch.get_default_dtype(), copy=True)  # memory of its own
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if missing := [part for part in parts if part not in weights]:
            raise InputError(f"{path}: {missing[0]} is missing")
        fused = name.replace("self_attn.q_proj", "attn.Wqkv")
        weights[fused] = torch.cat([weights.pop(part) for part in parts])
    return weights


def check_weights(expected, weights, directory):
    """Raises InputError unless `weights` has the names and shapes of `expected` (a state_dict)."""
    path = directory / "model.safetensors"
    for name in {**expected, **weights}:
        found, wanted = (
            tuple(tensors[name].shape) if name in tensors else "missing"
            for tensors in (weights, expected)
        )
        if found != wanted:
            raise InputError(f"{path}: {name} is {found}, config.json asks for {wanted}")


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


def has_layer_norm(directory):
    """Whether modules.json has a LayerNorm before the unit length (nomic-embed-text-v1.5).

    Raises InputError where texts are pooled in another way than by the mean of all their tokens."""
    path = directory / "1_Pooling" / "config.json"
    pooling = read_json(path) if path.is_file() else {}
    modes = {mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on}
    modes.add(str(pooling.get("pooling_mode", "mean")))
    if modes - {"mean", "pooling_mode_mean_tokens"} or pooling.get("include_prompt") is False:
        raise InputError(f"{path}: {pooling}; this model takes the mean of all tokens")
    path = directory / "modules.json"
    return path.is_file() and any("LayerNorm" in line for _, line in read_lines(path))


# ------------------------------------------------------------------------------------------------
# Writing


def write_checkpoint(directory, config, weights, tokenizer, layer_norm, architecture, prompts):
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
            "dtype": "float32",
        }
    }
    modules = ["Transformer", "Pooling", *["LayerNorm"] * layer_norm, "Normalize"]
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else ""}
        | {"type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)
    ]
    pooling = {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    files["1_Pooling/config.json"] = pooling
    files["sentence_bert_config.json"] = {"max_seq_length": MAX_TOKENS, "do_lower_case": False}
    files["config_sentence_transformers.json"] = {
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if tokenizer:
        write_whole(directory / "tokenizer.json", lambda path: tokenizer.save(str(path)))
        special = {f"{x}_token": f"[{x.upper()}]" for x in ("pad", "unk", "cls", "sep", "mask")}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
        files["tokenizer_config.json"] = settings | special
    if layer_norm:  # it has no weights in the model, and neutral ones here
        files["2_LayerNorm/config.json"] = {"dimension": hidden_size}
        neutral = {"norm.weight": torch.ones(hidden_size), "norm.bias": torch.zeros(hidden_size)}
        path = directory / "2_LayerNorm" / "model.safetensors"
        write_whole(path, lambda temporary: save_file(neutral, temporary))
    for name, content in files.items():
        write_json(directory / name, content)
    stored = {}
    for name, weight in weights.items():
        name = re.sub(r"^bert\.", "nomic_bert.", name)
        name = name.replace("predictions.decoder.bias", "predictions.bias")
        stored[name] = weight.detach().to("cpu", torch.float32).contiguous()
    if stored.pop("cls.predictions.decoder.weight", None) is not None:  # tied: stored once
        stored.setdefault("cls.predictions.transform.dense.bias", torch.zeros(hidden_size))
        stored.setdefault("cls.predictions.bias", torch.zeros(config["vocab_size"]))
    path = directory / "model.safetensors"
    write_whole(path, lambda temporary: save_file(stored, temporary, {"format": "pt"}))
