"""What a model folder's config.json and generation_config.json say."""

from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.io.files import check_folder, read_json
from rlhf.io.near_misses import folder_remedy
from rlhf.io.tokenizer_files import read_ids
from rlhf.io.weights import read_names
from rlhf.models.architecture import Architecture, ModelShape, architectures, get_architecture

ModelKind = Literal["language model", "reward model"]

_DEFAULT_TYPE = "gpt2"
"""The `model_type` of a config.json that has none."""


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
        family = get_architecture(settings.get("model_type", _DEFAULT_TYPE))
        return [family.sequence_classifier if "score.weight" in read_names(folder) else family.causal_lm]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'}: architectures must be a list of names, got {names!r}")
    return names


def class_of(family: Architecture, kind: ModelKind) -> str:
    """Hugging Face's class of an architecture's language models, or of its reward models."""
    return family.causal_lm if kind == "language model" else family.sequence_classifier


def kinds_of(name: str) -> set[ModelKind]:
    """What kinds of model a class of Hugging Face's is read as; empty for one that is not read."""
    kinds: set[ModelKind] = set()
    for family in architectures():
        if name == family.causal_lm or name in family.aliases:
            kinds.add("language model")
        if name == family.sequence_classifier:
            kinds.add("reward model")
    return kinds


def read_shape(folder: Path, settings: dict[str, Any]) -> ModelShape:
    """The shape that the settings of config.json describe; UserError if no architecture has it."""
    path = folder / "config.json"
    try:
        shape: ModelShape = get_architecture(settings.get("model_type", _DEFAULT_TYPE)).settings_to_shape(settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return shape


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
