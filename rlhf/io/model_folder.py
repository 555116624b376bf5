"""Model folders in Hugging Face form, read and written: `transformers` loads what we save, and we load what it saves.

A language model is a `GPT2LMHeadModel`, a reward model a `GPT2ForSequenceClassification` with one label. Beside
`config.json`, `model.safetensors` and the tokenizer there may be `value_head.safetensors` (a value head on the trunk),
`critic/` (a separate critic: a folder of the same form) and `reward_statistics.json`.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf.errors import UserError
from rlhf.gpt2 import from_hugging_face, to_hugging_face
from rlhf.gpt2_config import GPT2Config
from rlhf.io.files import atomic_folder, check_folder, read_json, save_tensors, sha256
from rlhf.io.manifest import check_replaceable, has_manifest, read_manifest, write_manifest
from rlhf.io.tokenizer import Tokenizer
from rlhf.tree import all_finite, as_new, cast
from rlhf.types import Params

_SHAPE_KEYS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
_REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_DEFAULTS = {"activation_function": "gelu_new", "scale_attn_weights": True, "tie_word_embeddings": True}


class LanguageModel(NamedTuple):
    """A GPT-2 with its tokenizer."""

    params: Params
    """float32."""
    config: GPT2Config
    tokenizer: Tokenizer


class RewardStatistics(NamedTuple):
    """Scores of reference completions, by which PPO normalises."""

    mean: float
    std: float
    completions: int
    """How many there were; 0 where nothing was measured."""


class RewardModel(NamedTuple):
    """A scalar GPT-2 with its tokenizer."""

    params: Params
    """{"trunk": GPT-2, "head": {"weight": [1, D]}}, float32."""
    config: GPT2Config
    tokenizer: Tokenizer
    statistics: RewardStatistics
    """Mean 0 and std 1 where the folder has none."""


def save_language_model(
    folder: Path,
    model: LanguageModel,
    *,
    facts: dict[str, Any],
    value_head: Params | None = None,
    critic: RewardModel | None = None,
) -> None:
    """Write a language model, replacing what stands at `folder` in one step.

    Args:
        folder: where to.
        model: parameters, shape and tokenizer.
        facts: what the manifest says beside the checksums, such as the stage and the seed.
        value_head: saved beside it as value_head.safetensors.
        critic: saved beside it as critic/.

    Raises:
        UserError: the disk is full, the folder cannot be written, or what stands there is not as we wrote it.
    """
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        _write_model(temporary, to_hugging_face(model.params), model.config, model.tokenizer, "GPT2LMHeadModel")
        if value_head is not None:
            save_tensors(temporary / "value_head.safetensors", value_head)
        if critic is not None:
            (temporary / "critic").mkdir()
            _write_reward_model(temporary / "critic", critic)
        write_manifest(temporary, facts)


def save_reward_model(folder: Path, model: RewardModel, *, facts: dict[str, Any]) -> None:
    """Write a reward model, replacing what stands at `folder` in one step; arguments as `save_language_model`."""
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        _write_reward_model(temporary, model)
        _write_json(temporary / "reward_statistics.json", model.statistics._asdict())
        write_manifest(temporary, facts)


def load_language_model(folder: Path) -> LanguageModel:
    """Read a `GPT2LMHeadModel` folder, ours or one that `transformers` saved.

    Raises:
        UserError: a file is missing, cut off, altered or holds another kind of model, or a weight is not finite.
    """
    config, state = _read_model(folder, "GPT2LMHeadModel")
    return LanguageModel(_trunk(folder, state, config), config, _tokenizer(folder, config))


def load_reward_model(folder: Path) -> RewardModel:
    """Read a one-label `GPT2ForSequenceClassification` folder. Errors as `load_language_model`."""
    config, state = _read_model(folder, "GPT2ForSequenceClassification")
    head = state.get("score.weight")
    if head is None or head.shape != (1, config.n_embd):
        got = "no score.weight" if head is None else f"score.weight of shape {tuple(head.shape)}"
        raise UserError(f"{folder}: has {got}, expected shape (1, {config.n_embd}): a reward model with one label")
    params = {"trunk": _trunk(folder, state, config), "head": {"weight": head.float()}}
    path = folder / "reward_statistics.json"
    statistics = RewardStatistics(0.0, 1.0, 0)
    if path.is_file():
        try:
            statistics = RewardStatistics(**read_json(path))
            if not (math.isfinite(statistics.mean) and 0 < statistics.std < math.inf):
                raise ValueError("mean must be finite and std above 0")
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
    return RewardModel(params, config, _tokenizer(folder, config), statistics)


def load_shape(folder: Path) -> GPT2Config:
    """The shape of the model that a folder holds, from config.json alone. Errors as `load_language_model`."""
    return _shape(folder, _read_config(folder))


def is_reward_model(folder: Path) -> bool:
    """Whether config.json says that the folder holds a `GPT2ForSequenceClassification`."""
    return "GPT2ForSequenceClassification" in _read_config(folder).get("architectures", [])


def check_model_folder(folder: Path, architecture: str) -> dict[str, Any]:
    """The settings in config.json, which may not say that the folder holds a model of another architecture.

    Raises:
        UserError: it does, there is no such folder, or it has no config.json that can be read.
    """
    settings = _read_config(folder)
    if architecture not in (found := settings.get("architectures") or [architecture]):
        raise UserError(f"{folder}: holds a {found[0]}, expected a {architecture}")
    return settings


def _write_model(
    folder: Path, state: dict[str, Tensor], config: GPT2Config, tokenizer: Tokenizer, architecture: str
) -> None:
    settings: dict[str, Any] = {"architectures": [architecture], "model_type": "gpt2"}
    settings |= {key: getattr(config, key) for key in _SHAPE_KEYS} | _DEFAULTS
    settings |= {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dtype": "float32"}
    if architecture == "GPT2ForSequenceClassification":
        settings |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    _write_json(folder / "config.json", settings)
    save_tensors(folder / "model.safetensors", state)
    tokenizer.save(folder)


def _write_reward_model(folder: Path, model: RewardModel) -> None:
    """A trunk with a scalar head; a critic's head, which has a bias, goes to value_head.safetensors as well."""
    state = to_hugging_face(model.params["trunk"]) | {"score.weight": model.params["head"]["weight"]}
    _write_model(folder, state, model.config, model.tokenizer, "GPT2ForSequenceClassification")
    if "bias" in model.params["head"]:
        save_tensors(folder / "value_head.safetensors", model.params["head"])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    check_folder(folder, "it should be a model folder with config.json and model.safetensors on this machine")
    if not path.exists():
        raise UserError(f"{path}: no such file; {folder} is no model folder")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a JSON object; {folder} is no model folder")
    return settings


def _read_model(folder: Path, architecture: str) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Shape and raw state dict, after all checks that need no parameters."""
    config = _shape(folder, check_model_folder(folder, architecture))
    if has_manifest(folder):
        read_manifest(folder)
    return config, _read_tensors(folder)


def _shape(folder: Path, settings: dict[str, Any]) -> GPT2Config:
    path = folder / "config.json"
    for key, allowed in _REQUIRED.items():
        if (got := settings.get(key, allowed[0])) not in allowed:
            raise UserError(f"{path}: {key} is {got!r}, expected {allowed[0]!r}; only plain GPT-2 models can be read")
    try:
        config = GPT2Config(**{key: settings[key] for key in _SHAPE_KEYS if key in settings})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    if settings.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner is {settings['n_inner']}, expected {4 * config.n_embd} (4 n_embd)")
    return config


def weights_digest(folder: Path) -> str:
    """Hex digests of the files that decide what a model gives: its weights, and the statistics of its reward.

    Raises:
        UserError: there are no weights.
    """
    statistics = folder / "reward_statistics.json"
    return "+".join(map(sha256, [*_weight_files(folder), *([statistics] if statistics.is_file() else [])]))


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            names = read_json(index)["weight_map"].values()
            return sorted({folder / name for name in names})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: cannot be read ({error})") from error
    raise UserError(
        f"{whole}: no such file; weights are read from safetensors alone (convert pickled .bin files first)"
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            state |= as_new(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot be read ({error}); the file is missing, cut off or damaged") from error
    return state


def _tokenizer(folder: Path, config: GPT2Config) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, but the model's vocab_size is "
            f"{config.vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer


def _trunk(folder: Path, state: dict[str, Tensor], config: GPT2Config) -> Params:
    _check_values(folder, {name: leaf for name, leaf in state.items() if not name.startswith("lm_head.")})
    try:
        params: Params = cast(from_hugging_face(state, config=config), torch.float32)
    except ValueError as error:
        raise UserError(f"{folder}: model.safetensors does not match config.json ({error})") from error
    return params


def _check_values(folder: Path, state: dict[str, Tensor]) -> None:
    for name, leaf in state.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # causal-mask buffers
        if not leaf.is_floating_point():
            raise UserError(f"{folder}: {name} has dtype {leaf.dtype}, expected floating-point numbers")
        if not all_finite(leaf):
            raise UserError(f"{folder}: {name} holds values that are not finite; the model is damaged")
