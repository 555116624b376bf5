"""Where PPO's scores come from: reward-model folders, Python functions, or a weighted mix of them.

A source is written `[WEIGHT*]FOLDER`, `[WEIGHT*]module:function` or `[WEIGHT*]file.py:function`. A function has the
signature of TRL's reward functions: it is called with `prompts`, `completions` and one list for each other column of
the prompt file that it accepts, all by keyword, and returns one float per completion.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import UserError
from rlhf.io.model_folder import RewardModel, is_reward_model, load_reward_model, weights_digest
from rlhf.io.tokenizer import Tokenizer
from rlhf.stages.user_functions import call_function, load_function

_SOURCE = re.compile(r"(?:(?P<weight>[-+]?[\d.]+(?:[eE][-+]?\d+)?)\*)?(?P<target>.+)", re.DOTALL)


class RewardSource(NamedTuple):
    """One term of the reward."""

    name: str
    weight: float
    """0 makes it a gold score: logged, and never optimised."""
    model: RewardModel | None
    """Either a reward model …"""
    function: Callable[..., Any] | None
    """… or a Python function."""

    @property
    def metric(self) -> str:
        """Its name in the log."""
        return f"{'reward' if self.weight else 'gold'}/{self.name}"


def open_sources(specs: Sequence[str], tokenizer: Tokenizer) -> list[RewardSource]:
    """Load every source.

    Raises:
        UserError: a source is neither a folder nor a function that can be imported, has a weight that is no number,
            or is a reward model with another vocabulary than the policy's; or all weights are 0.
    """
    sources: list[RewardSource] = []
    for spec in specs:
        source = _open(spec, tokenizer)
        same = sum(source.name == other.name.partition("#")[0] for other in sources)
        sources.append(source._replace(name=f"{source.name}#{same + 1}") if same else source)
    if sources and not any(source.weight for source in sources):
        raise UserError(f"--ppo.reward {' '.join(specs)}: every weight is 0, so there is nothing to optimise")
    return sorted(sources, key=lambda source: source.weight == 0)  # a critic starts from the first reward model


def call_reward_function(
    source: RewardSource, prompts: Sequence[str], completions: Sequence[str], columns: Sequence[dict[str, Any]]
) -> list[float]:
    """One float per completion from a Python function.

    Args:
        source: its `function` is called.
        prompts: texts.
        completions: texts, without the stop token.
        columns: each completion's record of the prompt file.

    Raises:
        UserError: the function raises, or does not return one number per completion.
        NonFiniteError: a number is NaN or infinite.
    """
    assert source.function is not None, "only Python sources are called"
    return call_function(source.function, f"reward {source.name}", columns, prompts=prompts, completions=completions)


def check_source(spec: str) -> None:
    """Raise UserError unless the source is well written and, where it is a function, can be imported."""
    _, target = _parse(spec)
    if not Path(target).is_dir():
        _function(target, spec)
    elif not is_reward_model(Path(target)):
        raise UserError(f"{target}: holds no reward model, expected a GPT2ForSequenceClassification")


def source_digests(specs: Sequence[str]) -> list[str]:
    """`weights_digest` of the sources that are folders, in order. Errors as there."""
    targets = [Path(_parse(spec)[1]) for spec in specs]
    return [weights_digest(target) for target in targets if target.is_dir()]


def _open(spec: str, tokenizer: Tokenizer) -> RewardSource:
    weight, target = _parse(spec)
    folder = Path(target)
    if not folder.is_dir():
        return RewardSource(target.rpartition(":")[2], weight, None, _function(target, spec))
    model = load_reward_model(folder)
    if not model.tokenizer.same_vocabulary(tokenizer):
        raise UserError(
            f"{folder}: the reward model's vocabulary ({model.tokenizer.vocab_size} entries) is not the policy's "
            f"({tokenizer.vocab_size} entries); train it from the same SFT model"
        )
    return RewardSource(folder.name, weight, model, None)


def _parse(spec: str) -> tuple[float, str]:
    """(weight, folder or function)."""
    match = _SOURCE.fullmatch(spec)
    if match is None:
        raise UserError("--ppo.reward: a source is empty; give a folder or module:function")
    try:
        weight = float(match["weight"] or 1.0)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--ppo.reward {spec}: the weight {match['weight']!r} is not a number")
    return weight, match["target"]


def _function(target: str, spec: str) -> Callable[..., Any]:
    return load_function(target, f"--ppo.reward {spec}", "there is no such folder, and it is not")
