"""Judges of completions: Python functions that score one, or compare two.

A scorer has the signature of a reward function. A pairwise judge is told apart by its arguments:

    def judge(prompts: list[str], first: list[str], second: list[str], **columns: list) -> list[float]

It returns, for each prompt, the probability that `first` is the better one: 1 or 0 for a verdict, 0.5 for a tie. It is
called twice, with the completions in both orders, so that a bias towards one position cancels and shows.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.errors import UserError
from rlhf.evaluate.estimates import Array
from rlhf.io.user_functions import call_function, check_signature, load_function


class Judge(NamedTuple):
    """A Python function that scores completions, or compares two."""

    name: str
    """Name in the figures: eval/judge/<name>, eval/win_rate/<name>."""
    function: Callable[..., Any]
    pairwise: bool
    """True where the function compares two completions, False where it scores one."""


def open_judges(specs: Sequence[str]) -> list[Judge]:
    """Import every judge.

    Raises:
        UserError: a function cannot be imported or cannot be called as a judge, or two have the same name.
    """
    judges = [_open(spec) for spec in specs]
    names = [judge.name for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--judge: two judges are called {name}; rename one, so that their figures can be told apart"
            )
    return judges


def score(judge: Judge, prompts: Sequence[Any], completions: Sequence[Any], columns: Sequence[dict[str, Any]]) -> Array:
    """Return [B] scores of completions by a judge that scores one at a time.

    Args:
        judge: a scorer.
        prompts: [B] prompts, texts or lists of messages.
        completions: [B] completions, in the form of the prompts.
        columns: each prompt's record of the prompt file.

    Raises:
        UserError: the function raises, or does not return one number per completion.
        NonFiniteError: a number is NaN or infinite.
    """
    scores = call_function(judge.function, f"judge {judge.name}", columns, prompts=prompts, completions=completions)
    return np.array(scores)


class Preferences(NamedTuple):
    """A pairwise judge's probabilities that one model's completions are better than another's."""

    first: Array
    """[B] probability that the first model's completion is better, when it is shown first."""
    second: Array
    """[B] probability that the first model's completion is better, when it is shown second."""

    @property
    def outcome(self) -> Array:
        """[B] mean over both orders: above 0.5 a win of the first model, 0.5 a tie."""
        return (self.first + self.second) / 2


def prefer(
    judge: Judge, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], columns: Sequence[dict[str, Any]]
) -> Preferences:
    """Call a pairwise judge in both orders.

    A judge that always prefers the first position thus gives ties, as in Zheng et al. 2023, "Judging LLM-as-a-Judge",
    section 3.4, https://arxiv.org/abs/2306.05685.

    Args:
        judge: a pairwise judge.
        prompts: [B] prompts, texts or lists of messages.
        first: [B] completions of the first model, in the form of the prompts.
        second: [B] completions of the second model.
        columns: each prompt's record of the prompt file.

    Raises:
        UserError: the function raises, or does not return one number in [0, 1] per prompt.
        NonFiniteError: a number is NaN or infinite.
    """
    what = f"judge {judge.name}"
    forward = np.array(call_function(judge.function, what, columns, prompts=prompts, first=first, second=second))
    backward = np.array(call_function(judge.function, what, columns, prompts=prompts, first=second, second=first))
    for values in (forward, backward):
        if ((values < 0) | (values > 1)).any():
            bad = float(values[(values < 0) | (values > 1)][0])
            raise UserError(
                f"{what}: returned {bad:g}, expected the probability in [0, 1] that `first` is better "
                "(1 is first, 0 is second, 0.5 is a tie)"
            )
    return Preferences(forward, 1.0 - backward)


def _open(spec: str) -> Judge:
    function = load_function(spec, f"--judge {spec}")
    try:
        arguments = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a built-in
        arguments = set()
    pairwise = {"first", "second"} <= arguments
    check_signature(function, f"--judge {spec}", ["prompts", *(("first", "second") if pairwise else ("completions",))])
    return Judge(spec.rpartition(":")[2], function, pairwise)
