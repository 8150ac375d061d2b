"""Writes a model directory that others open: transformers, SentenceTransformer, and checkpoint.py.

config.json                                     the shape, in the dialect of transformers
model.safetensors                               the weights
tokenizer.json, tokenizer_config.json           for AutoTokenizer
modules.json, 1_Pooling/, ...                   for SentenceTransformer: mean, unit length, the
config_sentence_transformers.json               task prefixes as prompts
README.md                                       the model card, from the files of its run
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import MAX_TOKENS, NAMES, PREFIXES, ROPE_TYPES
from common import replace
from rope import ntk_base


def config_json(config, architecture):
    """config.json. Static NTK has no name in this dialect: it is a larger base, and written so."""
    theta, scaling = config.rope_base, config.rope_scaling
    if scaling == "ntk":
        theta, scaling = ntk_base(theta, config.rope_factor, config.head_size), "none"
    rope = {"rope_theta": theta, "rope_type": {v: k for k, v in ROPE_TYPES.items()}[scaling]}
    if scaling != "none":
        rope["factor"] = config.rope_factor
    return {
        "model_type": "nomic_bert",
        "architectures": [architecture],
        **{name: getattr(config, name) for name in NAMES},
        "max_position_embeddings": config.trained_length,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "pad_token_id": 0,
        "dtype": "float32",
    }


def stored_weights(model):
    """A model's weights under the names that transformers gives to the same class."""
    weights = {}
    for name, weight in model.state_dict().items():
        name = re.sub(r"^bert\.", "nomic_bert.", name)
        name = name.replace("predictions.decoder.bias", "predictions.bias")
        weights[name] = weight.detach().to("cpu", torch.float32).contiguous()
    if weights.pop("cls.predictions.decoder.weight", None) is not None:  # tied: stored once
        size, vocabulary = model.config.hidden_size, model.config.vocab_size
        weights.setdefault("cls.predictions.transform.dense.bias", torch.zeros(size))
        weights.setdefault("cls.predictions.bias", torch.zeros(vocabulary))
    return weights


# ------------------------------------------------------------------------------------------------
# The rest of the directory


def write_checkpoint(directory, model, encoder, architecture):
    """Writes a model directory, each file whole or not at all; the weights come last.

    encoder: the NomicBert in the model, for its tokenizer and the steps after it."""
    directory, config = Path(directory), model.config
    files = {"config.json": config_json(config, architecture)}
    if encoder.tokenizer:
        names = ("pad", "unk", "cls", "sep", "mask")
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it stands
            "model_max_length": MAX_TOKENS,
            **{f"{name}_token": f"[{name.upper()}]" for name in names},
        }
        replace(directory / "tokenizer.json", lambda path: encoder.tokenizer.save(str(path)))
    modules = ["Transformer", "Pooling", *["LayerNorm"] * encoder.layer_norm, "Normalize"]
    folders = ["", *(f"{i}_{name}" for i, name in enumerate(modules) if i)]
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(modules, folders, strict=True))
    ]
    size = config.hidden_size
    files["1_Pooling/config.json"] = {
        "word_embedding_dimension": size,
        "pooling_mode_mean_tokens": True,
    }
    files["sentence_bert_config.json"] = {"max_seq_length": MAX_TOKENS, "do_lower_case": False}
    files["config_sentence_transformers.json"] = {
        "prompts": PREFIXES,
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if encoder.layer_norm:
        files["2_LayerNorm/config.json"] = {"dimension": size}
        neutral = {"norm.weight": torch.ones(size), "norm.bias": torch.zeros(size)}
        replace(
            directory / "2_LayerNorm" / "model.safetensors", lambda path: save_file(neutral, path)
        )
    for name, content in files.items():
        text = json.dumps(content, indent=1)
        replace(directory / name, lambda path, text=text: path.write_text(text))
    weights = stored_weights(model)
    replace(
        directory / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"})
    )
