"""Advantage estimators: functions from rewarded completions to advantages and, with a critic, to value targets.

An estimator is a record with one pure function. `ESTIMATORS` holds those that `--ppo.estimator` knows by name. To add
one, write a file that calls `register_estimator`:

    def batch_mean(completions: RewardedCompletions) -> AdvantageEstimate:
        returns = completions.rewards.sum(dim=-1)
        centred = (returns - returns.mean()).unsqueeze(-1)
        return AdvantageEstimate(centred.expand(completions.mask.shape))

    register_estimator(Estimator("batch-mean", batch_mean, needs_critic=False))
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from rlhf.advantages import gae, returns_to_go
from rlhf.field_docs import documented
from rlhf.group_baselines import Baseline, Scale, dpo_advantages, group_advantages


@documented
class RewardedCompletions(NamedTuple):
    """Input of an estimator: the completions of one iteration, as constants in float32 or float64."""

    scores: Tensor
    """[B] reward units: score of each completion."""
    kl: Tensor
    """[B, T] nats: KL(policy || reference) per token; 0 where the mask is False."""
    rewards: Tensor
    """[B, T] reward units: the score on the last token, and the KL penalty on every token unless it is in the loss."""
    mask: Tensor
    """[B, T] bool: True on the tokens of each row."""
    groups: Tensor | None = None
    """[B] int64: index of the prompt, equal for completions of the same prompt. None if unknown."""
    values: Tensor | None = None
    """[B, T] reward units: values of the critic. None without a critic."""
    bootstrap_value: Tensor | None = None
    """[B] reward units: value of the state after the last token of each row. None stands for 0."""
    gamma: float | Tensor = 1.0
    """Discount factor per token."""
    lam: float | Tensor = 0.95
    """Lambda parameter of generalised advantage estimation."""
    kl_coef: float | Tensor = 0.0
    """KL coefficient, in reward units per nat, wherever the KL is."""


@documented
class AdvantageEstimate(NamedTuple):
    """Result of an estimator."""

    advantages: Tensor
    """[B, T] reward units: advantage of each token."""
    returns: Tensor | None = None
    """[B, T] reward units: targets of the value function. None without a critic."""


@documented
class Estimator(NamedTuple):
    """An advantage estimator."""

    name: str
    """Name, as `--ppo.estimator` takes it."""
    function: Callable[[RewardedCompletions], AdvantageEstimate]
    """Pure function. Its results at masked positions are ignored."""
    needs_critic: bool
    """True if the function reads values and returns their targets. If False, the run has no critic."""
    whiten: bool = True
    """True if a run whitens its advantages by default. False where their scale is part of the method."""
    compares_groups: bool = False
    """True if the function compares the completions of a prompt, of which a run then needs several."""


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


def _group_estimator(name: str, *, baseline: Baseline, scale: Scale) -> Estimator:
    """Return an estimator that gives every token of a completion the completion's advantage in its group."""

    def estimate(completions: RewardedCompletions) -> AdvantageEstimate:
        returns = completions.rewards.sum(dim=-1)
        advantages = group_advantages(returns, _groups_of(completions), baseline=baseline, scale=scale)
        return AdvantageEstimate(advantages.unsqueeze(-1).expand(completions.mask.shape))

    return Estimator(name, estimate, needs_critic=False, whiten=False, compares_groups=True)


def _online_dpo(completions: RewardedCompletions) -> AdvantageEstimate:
    log_ratios, beta = completions.kl.sum(dim=-1), completions.kl_coef  # k1
    advantages = dpo_advantages(completions.scores, log_ratios, _groups_of(completions), beta=beta)
    return AdvantageEstimate(advantages.unsqueeze(-1).expand(completions.mask.shape))


def _groups_of(completions: RewardedCompletions) -> Tensor:
    if completions.groups is None:
        raise ValueError("group estimator: groups is None, expected the prompt of each completion")
    return completions.groups


def _returns_to_go(completions: RewardedCompletions) -> AdvantageEstimate:
    return AdvantageEstimate(returns_to_go(completions.rewards, completions.mask, gamma=completions.gamma))


RLOO = _group_estimator("rloo", baseline="leave_one_out", scale="none")
"""Score minus the mean of the group's others, Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740."""
GRPO = _group_estimator("grpo", baseline="mean", scale="group_std")
"""Score standardised within the group, Shao et al. 2024, https://arxiv.org/abs/2402.03300."""
DR_GRPO = _group_estimator("dr-grpo", baseline="mean", scale="none")
"""Score minus the group's mean, Liu et al. 2025, https://arxiv.org/abs/2503.20783."""
REINFORCE_PLUS_PLUS = Estimator("reinforce++", _returns_to_go, needs_critic=False)
"""Return to go, whitened over the batch's tokens, Hu 2025, https://arxiv.org/abs/2501.03262."""
ONLINE_DPO = Estimator("online-dpo", _online_dpo, needs_critic=False, whiten=False, compares_groups=True)
"""Gradient of DPO on the pairs of the two completions of each prompt, Guo et al. 2024, https://arxiv.org/abs/2402.04792."""

ESTIMATORS = {estimator.name: estimator for estimator in (GAE, RLOO, GRPO, DR_GRPO, REINFORCE_PLUS_PLUS, ONLINE_DPO)}
"""Estimators by name."""


def register_estimator(estimator: Estimator) -> None:
    """Add an estimator to `ESTIMATORS`, so that `--ppo.estimator` takes its name.

    A file that is imported again replaces its own estimator.

    Args:
        estimator: the estimator.

    Raises:
        ValueError: another estimator has the same name.

    Example:
        >>> def score_as_advantage(completions):
        ...     return AdvantageEstimate(completions.scores.unsqueeze(-1).expand(completions.mask.shape))
        >>> register_estimator(Estimator("score", score_as_advantage, needs_critic=False))
        >>> "score" in ESTIMATORS
        True
    """
    known = ESTIMATORS.get(estimator.name, estimator)
    if _source(known) != _source(estimator):
        raise ValueError(f"register_estimator: there is another estimator {estimator.name!r}; take another name")
    ESTIMATORS[estimator.name] = estimator


def _source(estimator: Estimator) -> tuple[object, ...]:
    """Return the fields of an estimator, with file and name for its function: another import does not change them."""
    code = getattr(estimator.function, "__code__", None)
    function = estimator.function if code is None else (code.co_filename, code.co_qualname)
    return function, estimator[2:]
