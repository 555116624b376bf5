"""A model folder's weights: which files hold them, their names, and the checks that need no model.

Names that do not decide the output are left out; what does, and has no place in a GPT-2 with tied embeddings, is
refused.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlhf.errors import UserError
from rlhf.gpt2 import empty, from_hugging_face
from rlhf.gpt2_config import GPT2Config
from rlhf.io.files import read_json
from rlhf.io.near_misses import pointer_remedy, weights_remedy
from rlhf.tree import all_finite, as_new, cast, named_leaves
from rlhf.types import Params

_SAVED_BY = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "base_model.model.": "PEFT",
    "base_model.": "trlX",
    "pretrained_model.": "TRL",
}
_MASKS = (".attn.bias", ".attn.masked_bias")
_VALUE_HEAD = "v_head."
_HEADS = ("lm_head.", "score.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        UserError: there are none, or their index cannot be read.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            names = read_json(index)["weight_map"].values()
            return sorted({folder / name for name in names})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: cannot be read ({error})") from error
    if remedy := weights_remedy(folder):
        raise UserError(f"{whole}: no such file; {folder} {remedy}")
    raise UserError(f"{whole}: no such file; weights are read from safetensors alone")


def read_names(folder: Path) -> set[str]:
    """The names of the weights, read without their values. Errors as `read_weights`."""
    names: set[str] = set()
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as stream:
                names |= set(stream.keys())
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    return names


def read_weights(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights by name, and lines for the user about those left out.

    Raises:
        UserError: a file is missing, cut off or damaged, or the names are not those of a GPT-2.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            state |= as_new(load_file(file))
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    _check_prefix(folder, state)
    value_head = [name for name in state if name.startswith(_VALUE_HEAD)]
    if not value_head:
        return state, ()
    rest = {name: leaf for name, leaf in state.items() if name not in value_head}
    return rest, (f"{folder}: the weights have a value head ({_VALUE_HEAD}*), which is not read",)


def read_trunk(folder: Path, state: dict[str, Tensor], config: GPT2Config) -> Params:
    """The GPT-2 among the weights, in float32.

    Args:
        folder: of the model, for errors.
        state: from `read_weights`.
        config: the shape that config.json says.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or not finite.
    """
    aside = [name for name in state if name.startswith("lm_head.") or name.endswith(_MASKS)]
    named = {name: leaf for name, leaf in state.items() if name not in aside}
    for name, leaf in named.items():
        if not leaf.is_floating_point():
            raise UserError(f"{folder}: {name} has dtype {leaf.dtype}, expected floating-point numbers")
        if not all_finite(leaf):
            raise UserError(f"{folder}: {name} holds values that are not finite; the model is damaged")
    names = {name.removeprefix("transformer."): name for name in named if not name.startswith(_HEADS)}
    expected = named_leaves(empty(config)).keys()
    unknown = [names[name] for name in names if name not in expected]
    if expected <= names.keys() and unknown:
        count = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{folder}: the weights have {unknown[0]}{count}, which a GPT-2 as in config.json has not")
    try:
        params: Params = cast(from_hugging_face(named, config=config), torch.float32)
    except ValueError as error:
        problem = str(error).removeprefix("from_hugging_face: ")
        raise UserError(f"{folder}: model.safetensors does not match config.json ({problem})") from error
    return params


def check_tied(folder: Path, state: dict[str, Tensor], embedding: Tensor) -> None:
    """Refuse an output layer other than the embedding.

    Args:
        folder: of the model, for errors.
        state: from `read_weights`.
        embedding: [V, D] float32, the rows that are used.

    Raises:
        UserError: lm_head.weight differs from the embedding, or lm_head.bias from 0.
    """
    weight, bias = state.get("lm_head.weight"), state.get("lm_head.bias")
    if weight is not None and not torch.equal(weight[: len(embedding)].float(), embedding):
        raise UserError(
            f"{folder}: lm_head.weight differs from the embedding (transformer.wte.weight); only GPT-2 models whose "
            "output layer is their embedding (tie_word_embeddings) can be read"
        )
    if bias is not None and bool((bias != 0).any()):
        raise UserError(f"{folder}: lm_head.bias is not 0; only GPT-2 models without a bias on the logits can be read")


def _check_prefix(folder: Path, state: dict[str, Tensor]) -> None:
    """Refuse names with something before those of a GPT-2, as wrappers around a model leave it."""
    if any("lora_" in name for name in state):
        raise UserError(
            f"{folder}: the weights have LoRA layers that are not merged; merge them first, with peft's "
            "merge_and_unload() and save_pretrained()"
        )
    full = next((name for name in state if name.endswith("wte.weight")), None)
    if full is None or (prefix := full.removesuffix("wte.weight")) in ("", "transformer."):
        return
    strip = prefix.removesuffix("transformer.")
    writer = next((f" ({writer})" for start, writer in _SAVED_BY.items() if strip.startswith(start)), "")
    raise UserError(
        f"{folder}: the names of the weights begin with {strip!r}{writer}, expected 'transformer.'; strip it: "
        f"load_file and save_file of safetensors.torch, with {{name.removeprefix({strip!r}): tensor for name, tensor "
        "in state.items()}"
    )


def _unreadable(file: Path, error: Exception) -> UserError:
    if remedy := pointer_remedy(file):
        return UserError(f"{file}: {remedy}")
    return UserError(f"{file}: cannot be read ({error}); the file is missing, cut off or damaged")
