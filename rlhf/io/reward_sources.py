"""Reward sources of PPO: reward-model folders, Python functions, or a weighted sum of them.

A source is written `[WEIGHT*]FOLDER`, `[WEIGHT*]module:function` or `[WEIGHT*]file.py:function`. A function has the
signature of TRL's reward functions: it is called with `prompts`, `completions` and one list for each other column of
the prompt file that it accepts, all as keyword arguments, and returns one float per completion. Prompts and completions
are texts, or lists of messages if the prompt file has conversations.
"""

import glob
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import UserError
from rlhf.io.model_folder import RewardModel, load_reward_model
from rlhf.io.paths import parse_source
from rlhf.io.tokenizer import Tokenizer
from rlhf.io.user_functions import call_function, check_signature, load_function
from rlhf.metrics import METRICS


class RewardSource(NamedTuple):
    """One term of the reward."""

    name: str
    weight: float
    """0 for a gold score, which is logged and never optimised."""
    model: RewardModel | None
    """The reward model, if the source is one."""
    function: Callable[..., Any] | None
    """The Python function, if the source is one. A model that is yet to be trained has neither."""

    @property
    def untrained(self) -> bool:
        """Return whether the source is a reward model that is yet to be trained."""
        return self.model is None and self.function is None

    @property
    def metric(self) -> str:
        """Return the key of its metric."""
        return f"{'reward' if self.weight else 'gold'}/{self.name}"


def expand_sources(specs: Sequence[str]) -> list[str]:
    """Return the sources with each `[WEIGHT*]PATTERN` replaced by the folders that match it, in order of their names.

    Raises:
        UserError: no folder matches.
    """
    expanded: list[str] = []
    for spec in specs:
        target = parse_source(spec)[1]
        if "*" not in target or Path(target).is_dir():
            expanded.append(spec)
            continue
        folders = sorted((path for path in glob.glob(target) if Path(path).is_dir()), key=_natural)
        if not folders:
            raise UserError(f"--ppo.reward {spec}: there is no such folder: no name matches {target}")
        expanded += [spec.removesuffix(target) + folder for folder in folders]
    return expanded


def _natural(path: str) -> tuple[int, str]:
    """Return a key by which folder 10 comes after folder 9."""
    return len(path), path


def open_sources(
    specs: Sequence[str], tokenizer: Tokenizer | None, untrained: Path | None = None
) -> list[RewardSource]:
    """Load every source.

    Args:
        specs: the sources as the user wrote them.
        tokenizer: the policy's tokenizer; None if it is yet to be trained.
        untrained: folder of a reward model that is yet to be trained.

    Raises:
        UserError: a source is neither a folder nor an importable function, has an invalid weight, or is a reward model
            whose vocabulary differs from the policy's, or has the name of a metric; or all weights are 0.
    """
    sources: list[RewardSource] = []
    for spec in specs:
        source = _open(spec, tokenizer, untrained)
        same = sum(source.name == previous.name.partition("#")[0] for previous in sources)
        source = source._replace(name=f"{source.name}#{same + 1}") if same else source
        if source.metric in METRICS:
            raise UserError(f"--ppo.reward {spec}: {source.metric} in the log is another metric; rename {source.name}")
        sources.append(source)
    if sources and not any(source.weight for source in sources):
        raise UserError(f"--ppo.reward {' '.join(specs)}: every weight is 0, so there is nothing to optimise")
    return sorted(sources, key=lambda source: source.weight == 0)  # a critic starts from the first reward model


def call_reward_function(
    source: RewardSource, prompts: Sequence[Any], completions: Sequence[Any], columns: Sequence[dict[str, Any]]
) -> list[float]:
    """Return one float per completion from a Python function.

    Args:
        source: the source whose `function` is called.
        prompts: texts, or lists of messages as in the prompt file.
        completions: texts without the stop token, or lists of the assistant's message.
        columns: each completion's record of the prompt file.

    Raises:
        UserError: the function raises, or does not return one number per completion.
        NonFiniteError: a number is NaN or infinite.
    """
    assert source.function is not None, "only Python sources are called"
    return call_function(source.function, f"reward {source.name}", columns, prompts=prompts, completions=completions)


def check_columns(sources: Sequence[RewardSource], columns: Collection[str]) -> None:
    """Raise UserError if a function cannot be called with prompts, completions and the columns that it accepts."""
    for source in sources:
        if source.function is not None:
            check_signature(source.function, f"reward {source.name}", ("prompts", "completions"), columns)


def check_vocabulary(folder: Path, tokenizer: Tokenizer | None, policy: Tokenizer | None) -> None:
    """Raise UserError if the vocabularies differ; a tokenizer that is yet to be trained is None."""
    if tokenizer is not None and policy is not None and not tokenizer.same_vocabulary(policy):
        raise UserError(
            f"{folder}: the reward model's vocabulary ({tokenizer.vocab_size} entries) is not the policy's "
            f"({policy.vocab_size} entries); train it from the same SFT model"
        )


def names_folder(spec: str, folder: Path) -> bool:
    """Return whether a source is the reward model in a folder, which may not exist yet."""
    return Path(parse_source(spec)[1]).resolve() == folder.resolve()


def _open(spec: str, tokenizer: Tokenizer | None, untrained: Path | None) -> RewardSource:
    weight, target = parse_source(spec)
    folder = Path(target)
    if untrained is not None and names_folder(spec, untrained):
        return RewardSource(folder.name, weight, None, None)
    if not folder.is_dir():
        function = load_function(target, f"--ppo.reward {spec}", "there is no such folder, and it is not")
        return RewardSource(target.rpartition(":")[2], weight, None, function)
    model = load_reward_model(folder)
    check_vocabulary(folder, model.tokenizer, tokenizer)
    return RewardSource(folder.name, weight, model, None)
