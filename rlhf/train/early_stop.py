"""The end of a stage that has gone wrong, before it wastes more time: pure rules over its newest metrics."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median

_FEWEST = 5
"""Consecutive steps that must agree."""

KEPT_FIRST, KEPT_NEWEST = _FEWEST, 3 * _FEWEST
"""Steps at the beginning and at the end of a history that the rules read."""

_BUDGETS = 4.0
"""KL, in budgets, from which a policy does not come back: its completions have lost all variety by then."""

_DIVERGED = 1.5
"""Training loss, as a multiple of its first values. A loss that falls and rises again within that is noise or
overfitting, which the health checks report."""


def find_failure(
    history: Sequence[Mapping[str, float]], *, kl_budget: float = math.inf, loss: str | None = None
) -> str:
    """Return the reason why training should stop now, with its evidence and remedy; empty if it should go on.

    Args:
        history: metrics of the steps so far, or of those since the run was resumed, the oldest first.
        kl_budget: budget of PPO in nats per completion.
        loss: name of the training loss of a supervised stage.

    Example:
        >>> find_failure([{"objective/kl": 60.0}] * 5, kl_budget=10.0).partition(":")[0]
        'the KL to the reference has been 60 nats or more for 5 iterations'
    """
    newest = history[-_FEWEST:]
    if len(newest) < _FEWEST:
        return ""
    kls = [metrics.get("objective/kl", 0.0) for metrics in newest]
    if min(kls) > _BUDGETS * kl_budget:
        return (
            f"the KL to the reference has been {min(kls):.3g} nats or more for {_FEWEST} iterations: over "
            f"{_BUDGETS:g} times the budget of {kl_budget:g}; lower --ppo.learning-rate or raise --ppo.kl-coef"
        )
    if loss is None or len(history) < KEPT_FIRST + KEPT_NEWEST:
        return ""
    first = fmean(metrics[loss] for metrics in history[:_FEWEST])
    last = median(metrics[loss] for metrics in history[-2 * _FEWEST :])
    if last > _DIVERGED * first > 0:
        return f"the loss has risen from {first:.3g} to {last:.3g}: lower the learning rate"
    return ""
