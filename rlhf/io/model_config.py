"""Reading config.json and generation_config.json of a model folder."""

from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.io.files import check_folder, read_json
from rlhf.io.near_misses import MODEL_FOLDER, folder_remedy
from rlhf.io.tokenizer_files import read_ids
from rlhf.io.weights import read_names
from rlhf.models.architecture import Architecture, ModelShape, architectures, get_architecture

ModelKind = Literal["language model", "reward model"]

_UNSUPPORTED = {
    "auto_map": "the model comes with code of its own, which is not run; use the folder of a model without",
    "quantization_config": "quantised weights are not read; load the model with transformers, dequantize() it "
    "and save it again",
}
"""Settings that are refused, each with the reason."""
_DEFAULT_TYPE = "gpt2"
"""The `model_type` assumed for a config.json without one."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings in config.json.

    Raises:
        UserError: the path is not a model folder, or the file cannot be read.
    """
    path = folder / "config.json"
    check_folder(folder, MODEL_FOLDER)
    is_adapter = (folder / "adapter_config.json").is_file()
    if (is_adapter or not path.exists()) and (remedy := folder_remedy(folder)):
        raise UserError(f"{folder}: {remedy}")
    if not path.exists():
        raise UserError(f"{path}: no such file; {folder} is not a model folder")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a JSON object; {folder} is not a model folder")
    return settings


def check_supported(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError if config.json asks for a model that no family computes, whatever its name."""
    for key, problem in _UNSUPPORTED.items():
        if settings.get(key):
            raise UserError(f"{folder / 'config.json'}: {key} is set: {problem}")


def read_architectures(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return the `architectures` of config.json; if it has none, the one that the names of the weights imply.

    Raises:
        UserError: `architectures` is not a list of names, or there are no weights.
    """
    names = settings.get("architectures")
    if names is None or names == []:
        family = _family(folder, settings)
        return [family.sequence_classifier if "score.weight" in read_names(folder) else family.causal_lm]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'}: architectures must be a list of names, got {names!r}")
    return names


def class_of(family: Architecture, kind: ModelKind) -> str:
    """Return the name of the Hugging Face class for models of an architecture and a kind."""
    return family.causal_lm if kind == "language model" else family.sequence_classifier


def classes_of(family: Architecture) -> set[str]:
    """Return the names of the Hugging Face classes that are read as models of an architecture."""
    return {family.causal_lm, family.sequence_classifier, *family.aliases}


def kinds_of(name: str) -> set[ModelKind]:
    """Return the kinds of model that a Hugging Face class can be read as; empty if it is not supported."""
    kinds: set[ModelKind] = set()
    for family in architectures():
        if name == family.causal_lm or name in family.aliases:
            kinds.add("language model")
        if name == family.sequence_classifier:
            kinds.add("reward model")
    return kinds


def read_shape(folder: Path, settings: dict[str, Any]) -> ModelShape:
    """Return the model shape that config.json describes. Raises UserError if no architecture supports it."""
    path = folder / "config.json"
    try:
        shape: ModelShape = _family(folder, settings).settings_to_shape(settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    return shape


def _family(folder: Path, settings: dict[str, Any]) -> Architecture:
    try:
        return get_architecture(settings.get("model_type", _DEFAULT_TYPE))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def read_generation_config(folder: Path, vocab_size: int) -> dict[str, Any] | None:
    """Return generation_config.json without token ids beyond the vocabulary; None if there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a JSON object")
    for key in [key for key in settings if key.endswith("_token_id")]:
        ids = read_ids(path, key, settings[key])
        valid = [number for number in ids if number < vocab_size]
        if valid != ids:
            settings[key] = valid or None
    return settings


def is_reward_model(folder: Path) -> bool:
    """Return whether the folder holds a model with a scalar head, such as a `LlamaForSequenceClassification`."""
    names = read_architectures(folder, read_config(folder))
    return len(names) == 1 and "reward model" in kinds_of(names[0])


def check_model_folder(folder: Path, kind: ModelKind) -> dict[str, Any]:
    """Return the settings in config.json after checking that the folder holds a model of the kind.

    Raises:
        UserError: the folder holds another kind of model, does not exist, or has no readable config.json.
    """
    settings = read_config(folder)
    check_supported(folder, settings)
    names = read_architectures(folder, settings)
    if not any(kind in kinds_of(name) for name in names):
        own = [family for family in architectures() if names[0] in classes_of(family)]
        expected = " or ".join(class_of(family, kind) for family in own or architectures())
        raise UserError(f"{folder}: holds a {names[0]}, expected a {expected}")
    return settings
