"""Reading and checking the weights of a model folder.

Weights that do not affect the output are ignored; others that the architecture does not have are refused.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf.errors import UserError
from rlhf.io.files import read_json
from rlhf.io.near_misses import pointer_remedy, weights_remedy
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.tree import all_finite, cast, named_leaves, realign
from rlhf.types import Params

_SAVED_BY = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "base_model.model.": "PEFT",
    "base_model.": "trlX",
    "pretrained_model.": "TRL",
}
_HEAD = "lm_head."
_VALUE_HEAD = "v_head."
_SCORE = "score."
_ASIDE = (_HEAD, _VALUE_HEAD, _SCORE)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        UserError: the folder has none, or their index cannot be read.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = read_json(index)["weight_map"].values()
            return sorted({folder / name for name in names})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: cannot be read ({error})") from error
    if remedy := weights_remedy(folder):
        raise UserError(f"{single}: no such file; {folder} {remedy}")
    raise UserError(f"{single}: no such file; weights are read from safetensors alone")


def read_names(folder: Path) -> set[str]:
    """Return the names of the weights, without reading their values.

    Raises:
        UserError: a file is missing, truncated or damaged.
    """
    return set(_read(folder, lambda name: False))


def read_weights(folder: Path, config: ModelShape) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the weights by name, and lines for the user about ignored ones.

    Args:
        folder: the model folder.
        config: the shape in config.json.

    Raises:
        UserError: a file is missing, truncated or damaged.
    """
    parts = _read(folder, lambda name: True).items()
    state = {_parameter_name(name, config): leaf for name, leaf in parts if leaf is not None}
    has_value_head = any(name.startswith(_VALUE_HEAD) for name in state)
    return state, (f"{folder}: the weights have a value head ({_VALUE_HEAD}*), which is not read",) * has_value_head


def check_weights(folder: Path, config: ModelShape, rows: int) -> None:
    """Check the names of a language model's weights and its output layer.

    Args:
        folder: the model folder.
        config: the shape in config.json.
        rows: number of rows of the embedding that are used.

    Raises:
        UserError: a file is damaged, a weight is missing or unknown, or the output layer differs from a tied embedding.
    """
    names = {_parameter_name(name, config) for name in read_names(folder)}
    _check_names(folder, names, config)
    if any(name.startswith(_HEAD) for name in names) and not _has_own_head(config):
        family = architecture_of(config)
        needed = (f"{family.output_layer}.", _HEAD)
        parts = _read(folder, lambda name: name.startswith(needed) or name.endswith(family.embedding))
        state = {_parameter_name(name, config): leaf for name, leaf in parts.items() if leaf is not None}
        check_tied(folder, state, config, rows)


def read_trunk(folder: Path, state: dict[str, Tensor], config: ModelShape) -> Params:
    """Return the decoder's parameters in float32, after checking them and those of a scalar head.

    Args:
        folder: the model folder, for errors.
        state: the weights, from `read_weights`.
        config: the shape in config.json.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or not finite.
    """
    _check_names(folder, state.keys(), config)
    family = architecture_of(config)
    names = named_leaves(family.empty(config))
    named = {name: leaf for name, leaf in state.items() if name.removeprefix(family.prefix) in names}
    for name, leaf in (named | {name: leaf for name, leaf in state.items() if name.startswith(_SCORE)}).items():
        if not leaf.is_floating_point():
            raise UserError(f"{folder}: {name} has dtype {leaf.dtype}, expected floating-point numbers")
        if not all_finite(leaf):
            raise UserError(f"{folder}: {name} holds values that are not finite; the model is damaged")
    try:
        params: Params = cast(family.from_hugging_face(named, config=config), torch.float32)
    except ValueError as error:
        problem = str(error).removeprefix("from_hugging_face: ")
        raise UserError(f"{folder}: model.safetensors does not match config.json ({problem})") from error
    return params


def check_tied(folder: Path, state: dict[str, Tensor], config: ModelShape, rows: int) -> None:
    """Refuse an output layer that differs from the embedding if the architecture ties the two.

    Args:
        folder: the model folder, for errors.
        state: the weights, from `read_weights`; only the embedding and the output layer are needed.
        config: the shape of the model.
        rows: number of rows of the embedding that are used.

    Raises:
        UserError: lm_head.weight differs from the embedding, or lm_head.bias from 0.
    """
    if _has_own_head(config):
        return
    family = architecture_of(config)
    embedding = next(leaf for name, leaf in state.items() if name.endswith(family.embedding))[:rows].float()
    weight, bias = state.get("lm_head.weight"), state.get("lm_head.bias")
    if weight is not None and not torch.equal(weight[:rows].float(), embedding):
        raise UserError(
            f"{folder}: lm_head.weight differs from the embedding ({family.prefix}{family.embedding}); only "
            f"{family.causal_lm} models whose output layer is their embedding (tie_word_embeddings) can be read"
        )
    if bias is not None and bool((bias != 0).any()):
        raise UserError(
            f"{folder}: lm_head.bias is not 0; only {family.causal_lm} models without a bias on the logits can be read"
        )


def _check_names(folder: Path, names: Collection[str], config: ModelShape) -> None:
    """Refuse names that are not the architecture's, such as those of wrappers around a model."""
    family = architecture_of(config)
    if any("lora_" in name for name in names):
        raise UserError(
            f"{folder}: the weights have LoRA layers that are not merged; merge them first, with peft's "
            "merge_and_unload() and save_pretrained()"
        )
    prefix = next((name.removesuffix(family.embedding) for name in names if name.endswith(family.embedding)), "")
    if prefix not in ("", family.prefix):
        strip = prefix.removesuffix(family.prefix)
        writer = next((f" ({writer})" for start, writer in _SAVED_BY.items() if strip.startswith(start)), "")
        raise UserError(
            f"{folder}: the names of the weights begin with {strip!r}{writer}, expected {family.prefix!r}; strip it: "
            f"load_file and save_file of safetensors.torch, with {{name.removeprefix({strip!r}): tensor for name, "
            "tensor in state.items()}"
        )
    expected = named_leaves(family.empty(config)).keys()
    weights = {name.removeprefix(family.prefix) for name in names if not name.endswith(family.ignored_suffixes)}
    weights = {name for name in weights if name in expected or not name.startswith(_ASIDE)}
    unknown = f"is in no {family.model_type} of that shape"
    for difference, problem in ((expected - weights, "is missing"), (weights - expected, unknown)):
        if difference:
            more = f", and {len(difference) - 1} more" if len(difference) > 1 else ""
            raise UserError(
                f"{folder}: model.safetensors does not match config.json ({min(difference)} {problem}{more})"
            )


def _parameter_name(name: str, config: ModelShape) -> str:
    """Return the parameter name of a weight in the folder, which differs for the output layer only."""
    layer = f"{architecture_of(config).output_layer}."
    return _HEAD + name.removeprefix(layer) if name.startswith(layer) else name


def _has_own_head(config: ModelShape) -> bool:
    """Return whether the output layer is a leaf of its own, untied from the embedding."""
    return "lm_head.weight" in named_leaves(architecture_of(config).empty(config))


def _read(folder: Path, is_needed: Callable[[str], bool]) -> dict[str, Tensor | None]:
    """Return all weights by name, with None for those that `is_needed` rejects."""
    state: dict[str, Tensor | None] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as stream:
                names = list(stream.keys())
                state |= {name: realign(stream.get_tensor(name)) if is_needed(name) else None for name in names}
        except (SafetensorError, OSError) as error:
            if remedy := pointer_remedy(file):
                raise UserError(f"{file}: {remedy}") from error
            raise UserError(f"{file}: cannot be read ({error}); the file is missing, cut off or damaged") from error
    return state
