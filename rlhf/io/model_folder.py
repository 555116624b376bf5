"""Reading and writing model folders in Hugging Face form, compatible with `transformers` in both directions.

A language model is what `AutoModelForCausalLM` saves, such as a `LlamaForCausalLM`; a reward model is what
`AutoModelForSequenceClassification` saves with one label. Beside `config.json`, the weights and the tokenizer there may
be `value_head.safetensors` (a value head on the trunk), `critic/` (a separate critic: a folder of the same form) and
`reward_statistics.json`.

Settings that affect tokens or logits are read or refused; the others are saved again unchanged. Embedding rows beyond
the tokenizer's entries are dropped, so that no id without a token is sampled, trained on or scored.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rlhf.errors import UserError
from rlhf.field_docs import documented
from rlhf.io.files import atomic_folder, read_json, save_tensors, sha256
from rlhf.io.manifest import check_replaceable, has_manifest, read_manifest, write_manifest
from rlhf.io.model_config import (
    ModelKind,
    check_model_folder,
    class_of,
    read_generation_config,
    read_shape,
)
from rlhf.io.tokenizer import Tokenizer
from rlhf.io.weights import check_tied, check_weights, read_trunk, read_weights, weight_files
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.output_layer import without_output_layer
from rlhf.types import Params


@documented
class LanguageModel(NamedTuple):
    """A decoder with its tokenizer."""

    params: Params
    """Parameters, float32."""
    config: ModelShape
    tokenizer: Tokenizer
    generation_config: dict[str, Any] | None = None
    """generation_config.json of the folder it was read from; None if there was none."""
    notes: tuple[str, ...] = ()
    """Lines for the user about the folder it was read from."""


@documented
class RewardStatistics(NamedTuple):
    """Mean and standard deviation of the scores of reference completions, with which PPO normalises."""

    mean: float
    std: float
    completions: int
    """Number of reference completions; 0 if none were scored."""


@documented
class RewardModel(NamedTuple):
    """A decoder with a scalar head, and its tokenizer."""

    params: Params
    """{"trunk": decoder, "head": {"weight": [1, D]}}, float32."""
    config: ModelShape
    tokenizer: Tokenizer
    statistics: RewardStatistics
    """Mean 0 and std 1 if the folder has none."""
    notes: tuple[str, ...] = ()
    """Lines for the user about the folder it was read from."""


def save_language_model(
    folder: str | Path,
    model: LanguageModel,
    *,
    facts: dict[str, Any],
    value_head: Params | None = None,
    critic: RewardModel | None = None,
) -> None:
    """Write a language model, replacing the content of `folder` atomically.

    Args:
        folder: the model folder.
        model: model to write.
        facts: fields of the manifest beside the checksums, such as the stage and the seed.
        value_head: parameters of a value head on the trunk, saved as value_head.safetensors; None if there is none.
        critic: separate critic, saved in critic/; None if there is none.

    Raises:
        UserError: the disk is full, the folder cannot be written, or its content was changed since it was saved.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        _write_model(temporary, _state(model.params, model.config), model.config, model.tokenizer, "language model")
        if model.generation_config is not None:
            _write_json(temporary / "generation_config.json", _stopping(model.generation_config, model.tokenizer))
        if value_head is not None:
            save_tensors(temporary / "value_head.safetensors", value_head)
        if critic is not None:
            (temporary / "critic").mkdir()
            _write_reward_model(temporary / "critic", critic)
        write_manifest(temporary, facts)


def save_reward_model(folder: str | Path, model: RewardModel, *, facts: dict[str, Any]) -> None:
    """Write a reward model, replacing the content of `folder` atomically.

    Args:
        folder: the model folder.
        model: model to write.
        facts: fields of the manifest beside the checksums, such as the stage and the seed.

    Raises:
        UserError: the disk is full, the folder cannot be written, or its content was changed since it was saved.
    """
    folder = Path(folder)
    check_replaceable(folder)
    with atomic_folder(folder) as temporary:
        _write_reward_model(temporary, model)
        _write_json(temporary / "reward_statistics.json", model.statistics._asdict())
        write_manifest(temporary, facts)


def load_language_model(folder: str | Path) -> LanguageModel:
    """Return the language model in a folder that rlhf or `transformers` saved, sharded or not.

    Raises:
        UserError: a file is missing, truncated, altered or holds another kind of model, or a weight is not finite.
    """
    folder = Path(folder)
    source = _read_model(folder, "language model")
    check_tied(folder, source.state, source.config, source.config.vocab_size)
    generation = read_generation_config(folder, source.config.vocab_size)
    return LanguageModel(source.trunk, source.config, source.tokenizer, generation, source.notes)


def load_reward_model(folder: str | Path) -> RewardModel:
    """Return the reward model in a folder that holds a sequence classifier with one label.

    Raises:
        UserError: a file is missing, truncated, altered or holds another kind of model, or a weight is not finite.
    """
    folder = Path(folder)
    source = _read_model(folder, "reward model")
    head, notes = source.state.get("score.weight"), list(source.notes)
    if head is None or head.shape != (1, source.config.n_embd):
        got = "no score.weight" if head is None else f"score.weight of shape {tuple(head.shape)}"
        raise UserError(
            f"{folder}: has {got}, expected shape (1, {source.config.n_embd}): a reward model with one label"
        )
    params = {"trunk": source.trunk, "head": {"weight": head.float()}}
    path = folder / "reward_statistics.json"
    statistics = RewardStatistics(0.0, 1.0, 0)
    if path.is_file():
        try:
            statistics = RewardStatistics(**read_json(path))
            if not (math.isfinite(statistics.mean) and 0 < statistics.std < math.inf):
                raise ValueError("mean must be finite and std above 0")
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if not has_manifest(folder):
            notes.append(
                f"{folder}: has no manifest.json, so a change of its weights, statistics or tokenizer is not noticed"
            )
    if source.settings.get("pad_token_id") == source.tokenizer.eos_id:
        notes.append(
            f"{folder}: pads with its end-of-text token, so that transformers reads the score at the token before it; "
            "here it is read at the end-of-text token"
        )
    return RewardModel(params, source.config, source.tokenizer, statistics, tuple(notes))


def load_trunk(folder: str | Path) -> LanguageModel:
    """Return the language model in a folder without its output layer, as the trunk of a model with a scalar head."""
    model = load_language_model(folder)
    shape = architecture_of(model.config).trunk_shape(model.config)
    return model._replace(params=without_output_layer(model.params), config=shape)


def load_shape(folder: Path) -> tuple[ModelShape, Tokenizer]:
    """Return the shape and tokenizer of the language model in a folder; its weights are checked by name only.

    Raises:
        UserError: a file is missing or cannot be read, the folder holds another kind of model, or a weight is missing.
    """
    shape = read_shape(folder, check_model_folder(folder, "language model"))
    config, tokenizer = _fit_vocabulary(folder, shape)
    check_weights(folder, shape, config.vocab_size)
    return config, tokenizer


def _stopping(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return generation settings that also stop at the end of a turn of the chat template."""
    ends = settings.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.chat_template is None or tokenizer.end_of_turn_id in known:
        return settings
    return settings | {"eos_token_id": [*known, tokenizer.end_of_turn_id]}


def _write_model(
    folder: Path, state: dict[str, Tensor], config: ModelShape, tokenizer: Tokenizer, kind: ModelKind
) -> None:
    family = architecture_of(config)
    settings: dict[str, Any] = {"architectures": [class_of(family, kind)], "model_type": family.model_type}
    settings |= family.shape_to_settings(config)
    stop_ids = list(tokenizer.stop_ids)
    settings |= {"bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id}
    settings |= {"eos_token_id": stop_ids if len(stop_ids) > 1 else tokenizer.eos_id}
    settings |= {"pad_token_id": tokenizer.pad_id}
    settings |= {"dtype": "float32"}
    if kind == "reward model":
        settings |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    _write_json(folder / "config.json", settings)
    save_tensors(folder / "model.safetensors", state)
    tokenizer.save(folder, pads_with_eos=kind == "language model")


def _state(params: Params, config: ModelShape) -> dict[str, Tensor]:
    return architecture_of(config).to_hugging_face(params)


def _write_reward_model(folder: Path, model: RewardModel) -> None:
    """Write a trunk with a scalar head; a head with a bias, a critic's, also goes to value_head.safetensors."""
    state = _state(model.params["trunk"], model.config) | {"score.weight": model.params["head"]["weight"]}
    _write_model(folder, state, model.config, model.tokenizer, "reward model")
    if "bias" in model.params["head"]:
        save_tensors(folder / "value_head.safetensors", model.params["head"])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Source(NamedTuple):
    """The content of a model folder, of either kind."""

    settings: dict[str, Any]
    """Content of config.json."""
    state: dict[str, Tensor]
    trunk: Params
    config: ModelShape
    tokenizer: Tokenizer
    notes: tuple[str, ...]


def _read_model(folder: Path, kind: ModelKind) -> _Source:
    """Return settings, weights and tokenizer after the checks common to language models and reward models."""
    settings = check_model_folder(folder, kind)
    shape = read_shape(folder, settings)
    if kind == "reward model":
        shape = architecture_of(shape).trunk_shape(shape)
    if has_manifest(folder):
        read_manifest(folder)
    state, notes = read_weights(folder, shape)
    trunk = read_trunk(folder, state, shape)
    config, tokenizer = _fit_vocabulary(folder, shape)
    notes += tokenizer.notes
    if surplus := shape.vocab_size - config.vocab_size:
        trunk = architecture_of(config).select_vocab(trunk, config.vocab_size)
        notes += (
            f"{folder}: the embedding has {shape.vocab_size} rows and the tokenizer {config.vocab_size} entries; the "
            f"last {surplus} rows are left out",
        )
    return _Source(settings, state, trunk, config, tokenizer, notes)


def weights_digest(folder: Path) -> str:
    """Return the hex digests of the files that determine a model's output: its weights and its reward statistics.

    Raises:
        UserError: there are no weights.
    """
    statistics = folder / "reward_statistics.json"
    return "+".join(map(sha256, [*weight_files(folder), *([statistics] if statistics.is_file() else [])]))


def _fit_vocabulary(folder: Path, config: ModelShape) -> tuple[ModelShape, Tokenizer]:
    """Return the shape with the vocabulary size of the folder's tokenizer, and that tokenizer."""
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, but the model's vocab_size is "
            f"{config.vocab_size}; use the tokenizer that the model was trained with"
        )
    shape: Any = config  # a frozen dataclass
    return dataclasses.replace(shape, vocab_size=tokenizer.vocab_size), tokenizer
