"""A model directory: config.json, model.safetensors, tokenizer.json. Nothing in it can carry code.

Weights have the names of the published checkpoints; config.json is in the dialect of transformers'
own NomicBert.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import replace
from options import InputError

# our name -> its name in config.json, where they differ
NATIVE = {"trained_length": "max_position_embeddings"}
ROPE = {"rope_base": "rope_theta", "rope_scaling": "rope_type", "rope_factor": "factor"}


def write_checkpoint(directory, model, tokenizer, architecture):
    """Writes a model directory; each file whole or not at all."""
    config = {NATIVE.get(name, name): value for name, value in vars(model.config).items()}
    config["rope_parameters"] = {ROPE[name]: config.pop(name) for name in ROPE}
    config |= {"model_type": "nomic_bert", "architectures": [architecture], "hidden_act": "silu"}
    weights = {
        name: weight.detach().contiguous()
        for name, weight in model.state_dict().items()
        if name != "cls.predictions.decoder.weight"  # tied to the word embeddings
    }
    directory = Path(directory)
    replace(directory / "config.json", lambda path: path.write_text(json.dumps(config, indent=1)))
    replace(directory / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    replace(
        directory / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"})
    )


def read_checkpoint(directory):
    """(our config's fields, name -> weight). Raises InputError naming the file that is amiss."""
    config_path, weights_path = Path(directory, "config.json"), Path(directory, "model.safetensors")
    if not Path(directory).is_dir():
        raise InputError(f"there is no checkpoint directory {directory}")
    try:
        config = json.loads(config_path.read_text())
        if config["model_type"] != "nomic_bert":
            raise InputError(f"{config_path}: model_type is {config['model_type']}, not nomic_bert")
        values = {name: config["rope_parameters"][ROPE[name]] for name in ROPE}
        values |= {ours: config[theirs] for ours, theirs in NATIVE.items()}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{config_path} cannot be read: {error!r}") from None
    try:
        return {**config, **values}, load_file(weights_path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights_path} cannot be read: {error}") from None


def load_weights(model, weights, directory):
    """Copies weights into a model. Raises InputError unless names and shapes fit exactly."""
    own = model.state_dict()
    for name in {**own, **weights}:
        shapes = [tuple(t[name].shape) if name in t else "missing" for t in (weights, own)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{directory}/model.safetensors: {name} is {shapes[0]}, "
                f"config.json asks for {shapes[1]}"
            )
    model.load_state_dict(weights)
