"""What a model folder's config.json and generation_config.json say."""

from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.io.files import check_folder, read_json
from rlhf.io.near_misses import folder_remedy
from rlhf.io.tokenizer_files import read_ids
from rlhf.io.weights import read_names
from rlhf.models.gpt2_config import GPT2Config

LANGUAGE_MODEL = "GPT2LMHeadModel"
REWARD_MODEL = "GPT2ForSequenceClassification"
ALIASES = {"GPT2Model": LANGUAGE_MODEL}
"""Architectures that are read as another: the output layer of a GPT-2 is its embedding, which a `GPT2Model` has."""

SHAPE_KEYS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
_REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in config.json.

    Raises:
        UserError: the folder is none, or holds something else than a model, or the file cannot be read.
    """
    path = folder / "config.json"
    check_folder(folder, "it should be a model folder with config.json and model.safetensors on this machine")
    is_adapter = (folder / "adapter_config.json").is_file()
    if (is_adapter or not path.exists()) and (remedy := folder_remedy(folder)):
        raise UserError(f"{folder}: {remedy}")
    if not path.exists():
        raise UserError(f"{path}: no such file; {folder} is no model folder")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a JSON object; {folder} is no model folder")
    return settings


def read_architectures(folder: Path, settings: dict[str, Any]) -> list[str]:
    """The architectures that config.json names; where it names none, the one that the names of the weights show.

    Raises:
        UserError: they are no list of names, or there are no weights.
    """
    names = settings.get("architectures")
    if names is None or names == []:
        return [REWARD_MODEL if "score.weight" in read_names(folder) else LANGUAGE_MODEL]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'}: architectures must be a list of names, got {names!r}")
    return names


def read_shape(folder: Path, settings: dict[str, Any]) -> GPT2Config:
    """The shape that the settings of config.json describe; UserError if it is not that of a plain GPT-2."""
    path = folder / "config.json"
    for key, allowed in _REQUIRED.items():
        if (got := settings.get(key, allowed[0])) not in allowed:
            raise UserError(f"{path}: {key} is {got!r}, expected {allowed[0]!r}; only plain GPT-2 models can be read")
    try:
        config = GPT2Config(**{key: settings[key] for key in SHAPE_KEYS if key in settings})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    if settings.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner is {settings['n_inner']}, expected {4 * config.n_embd} (4 n_embd)")
    return config


def read_generation_config(folder: Path, vocab_size: int) -> dict[str, Any] | None:
    """generation_config.json without token ids that the model does not have; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a JSON object")
    for key in [key for key in settings if key.endswith("_token_id")]:
        ids = read_ids(path, key, settings[key])
        kept = [number for number in ids if number < vocab_size]
        if kept != ids:
            settings[key] = kept or None
    return settings
