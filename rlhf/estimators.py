"""Advantage estimators: from rewarded completions to advantages, and to value targets where there is a critic.

An estimator is one pure function in a record. `ESTIMATORS` holds those that `--ppo.estimator` knows by name; one more
is a file that calls `register_estimator`:

    def batch_mean(completions: RewardedCompletions) -> AdvantageEstimate:
        returns = completions.rewards.sum(dim=-1)
        centred = (returns - returns.mean()).unsqueeze(-1)
        return AdvantageEstimate(centred.expand(completions.mask.shape))

    register_estimator(Estimator("batch-mean", batch_mean, needs_critic=False))
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from rlhf.advantages import gae
from rlhf.field_docs import documented


@documented
class RewardedCompletions(NamedTuple):
    """The input of an estimator: one iteration's completions, all constants, of float32 at least."""

    scores: Tensor
    """[B] reward units."""
    kl: Tensor
    """[B, T] nats: KL(policy || reference) per token; 0 where the mask is False."""
    rewards: Tensor
    """[B, T] reward units: the score on the last token and, unless the loss has it, the KL penalty on every one."""
    mask: Tensor
    """[B, T] bool, True on each row's tokens."""
    groups: Tensor | None = None
    """[B] int64: equal for completions of one prompt; None if unknown."""
    values: Tensor | None = None
    """[B, T] reward units; None without a critic."""
    bootstrap_value: Tensor | None = None
    """[B] reward units: value of the state after each row's last token; None is 0."""
    gamma: float | Tensor = 1.0
    """Discount per token."""
    lam: float | Tensor = 0.95
    """Lambda of generalised advantage estimation."""


@documented
class AdvantageEstimate(NamedTuple):
    """The result of an estimator."""

    advantages: Tensor
    """[B, T] reward units."""
    returns: Tensor | None = None
    """[B, T] reward units: targets of the value function; None without a critic."""


@documented
class Estimator(NamedTuple):
    """A way to estimate advantages."""

    name: str
    function: Callable[[RewardedCompletions], AdvantageEstimate]
    """Pure; its results at masked positions are ignored."""
    needs_critic: bool
    """True if it reads values and returns their targets; if False, the run has no critic."""


def _gae(completions: RewardedCompletions) -> AdvantageEstimate:
    assert completions.values is not None, "make_experience has checked it"
    advantages, returns = gae(
        completions.rewards,
        completions.values,
        completions.mask,
        gamma=completions.gamma,
        lam=completions.lam,
        bootstrap_value=completions.bootstrap_value,
    )
    return AdvantageEstimate(advantages, returns)


GAE = Estimator("gae", _gae, needs_critic=True)
"""Generalised advantage estimation (`rlhf.advantages.gae`)."""

ESTIMATORS = {GAE.name: GAE}
"""Estimators by name."""


def register_estimator(estimator: Estimator) -> None:
    """Add an estimator to `ESTIMATORS`.

    Raises:
        ValueError: another estimator has its name.

    Example:
        >>> def score_as_advantage(completions):
        ...     return AdvantageEstimate(completions.scores.unsqueeze(-1).expand(completions.mask.shape))
        >>> register_estimator(Estimator("score", score_as_advantage, needs_critic=False))
        >>> "score" in ESTIMATORS
        True
    """
    if ESTIMATORS.setdefault(estimator.name, estimator) != estimator:
        raise ValueError(f"register_estimator: there is another estimator {estimator.name!r}; take another name")
