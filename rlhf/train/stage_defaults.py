"""Defaults that follow from the model and the data: settings that are None get their value by rule.

The rules are pure functions; `choose_settings` writes what they choose into the configuration of the run and says it
in one line.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.config import OptimizerConfig, PPOConfig
from rlhf.errors import UserError
from rlhf.io.files import read_json
from rlhf.ranges import flat_fields
from rlhf.setting_rules import flag_of
from rlhf.train.context import Run

KEPT = 0.95
"""Share of the records that fit whole into the chosen context and completion length."""

_MAX_CONTEXT = 512
"""Longest context that the rule chooses; attention over longer ones is slow on CPUs."""

_CONTEXT_STEP, _LENGTH_STEP = 32, 8
_MISSING_EOS_PENALTY = 1.0
"""Penalty in standard deviations of a normalised reward model. The runs of TRL and OpenAI use 1 too."""


class StartFacts(NamedTuple):
    """Facts about the training of a model, from its manifest."""

    pretrained: bool
    """True unless rlhf trained it from random weights."""
    completion_tokens: int | None = None
    """Tokens of a completion, end-of-text included, within which `KEPT` of the demonstrations end; None if unknown."""
    ended: float | None = None
    """Share of the demonstrations that were trained with their end; None if unknown."""
    template: str | None = None
    """`common_template` of the demonstrations' prompts; None if unknown, or if they are conversations."""
    chat: bool = False
    """True if the demonstrations are conversations."""


def start_facts(folder: Path) -> StartFacts:
    """Return the facts of a model folder; a model that rlhf did not train from scratch counts as pre-trained."""
    try:
        manifest = read_json(folder / "manifest.json")
    except UserError:
        return StartFacts(pretrained=True)
    stage = manifest.get("stage")
    pretrained = manifest.get("pretrained", stage not in ("sft", "reward", "ppo"))  # older manifests do not say
    return StartFacts(
        bool(pretrained),
        manifest.get("completion_tokens"),
        manifest.get("ended"),
        manifest.get("template"),
        bool(manifest.get("chat")),
    )


def default_rate(settings: OptimizerConfig, *, pretrained: bool) -> float:
    """Return the default learning rate of a stage's settings."""
    return settings.default_rates()[pretrained]


def choose_learning_rate(run: Run, config: Any, facts: StartFacts) -> Any:
    """Return the configuration with a learning rate that fits the model to start from, unless one is set."""
    rate = default_rate(run.stage.section_of(config), pretrained=facts.pretrained)
    return choose_settings(run, config, {f"{run.stage.section}.learning_rate": rate}, describe_start(facts))


def describe_start(facts: StartFacts) -> str:
    """Return the kind of the model that training starts from, in words."""
    return "a pre-trained model" if facts.pretrained else "a model from scratch"


def fit_length(lengths: np.ndarray, *, step: int, least: int, most: int) -> int:
    """Return the length that `KEPT` of the records do not exceed, rounded up to a multiple of `step`, within bounds.

    Args:
        lengths: [n] tokens of each record.
        step: multiple to round up to.
        least: lower bound of the result.
        most: upper bound of the result, which takes precedence over `least`.
    """
    length = int(np.quantile(lengths, KEPT, method="inverted_cdf")) if len(lengths) else least
    return min(max(-(-length // step) * step, least), most)


def fit_context(lengths: np.ndarray, preset: int) -> int:
    """Return the context of a new model: its preset's, or a longer one that the records need, up to 512 tokens."""
    return fit_length(lengths, step=_CONTEXT_STEP, least=preset, most=max(preset, _MAX_CONTEXT))


def fit_completion(tokens: int | None, context: int) -> int:
    """Return the length limit of PPO's completions: that of the demonstrations, or 32; at most half the context."""
    wanted = 32 if tokens is None else math.ceil(tokens / _LENGTH_STEP) * _LENGTH_STEP
    return max(1, min(wanted, context // 2))


def default_eos_penalty(settings: PPOConfig, facts: StartFacts, max_new_tokens: int) -> float:
    """Return the default penalty of completions that do not end: 1 if most demonstrations end in time, else 0."""
    ends = facts.ended is not None and facts.ended >= 0.5
    in_time = facts.completion_tokens is not None and facts.completion_tokens <= 2 * max_new_tokens
    return _MISSING_EOS_PENALTY if settings.stop_at_eos and ends and in_time else 0.0


def choose_settings(run: Run, config: Any, chosen: dict[str, Any], reason: str) -> Any:
    """Return the configuration with values for settings that are None, after noting them; the run has it too.

    Args:
        run: run of the stage.
        config: configuration of the run.
        chosen: values by dotted name; those of settings that are set are ignored.
        reason: reason for the values, in words for the user.
    """
    fields = flat_fields(config)
    values = {name: value for name, value in chosen.items() if fields[name] is None and value is not None}
    for name, value in values.items():
        section, _, field = name.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    if values:
        run.note(f"chosen by rule for {reason}: {' '.join(flag_of(name, value) for name, value in values.items())}")
    run.config = config
    return config
