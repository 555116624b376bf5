"""The estimator and the policy loss of a PPO run: by name, or Python functions of the user."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PPOConfig, PPORun
from rlhf.errors import UserError
from rlhf.estimators import ESTIMATORS, AdvantageEstimate, Estimator, RewardedCompletions
from rlhf.io.reward_identity import code_digest
from rlhf.io.user_functions import describe_error, load_function
from rlhf.ops import mean_metrics
from rlhf.policy_losses import POLICY_LOSSES, PolicyLoss


def open_estimator(settings: PPOConfig) -> Estimator:
    """Return the estimator of a run.

    A function of the user takes `rlhf.estimators.RewardedCompletions` and returns an `AdvantageEstimate` without
    returns, as those of the table do. It reads no values, and its advantages are used unchanged.

    Raises:
        UserError: the function cannot be imported.
    """
    name = settings.estimator
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    function = _load(name, "estimator")

    def estimate(completions: RewardedCompletions) -> AdvantageEstimate:
        with _user_code(f"--ppo.estimator {name}"):
            result = function(completions)
            if not isinstance(result, AdvantageEstimate):
                raise TypeError(f"it returned a {type(result).__name__}, expected an AdvantageEstimate")
            if not result.advantages[completions.mask].isfinite().all():
                raise ValueError("its advantages are not finite")
        return result

    return Estimator(name, estimate, needs_critic=False, whiten=False)


def open_policy_loss(settings: PPOConfig) -> PolicyLoss:
    """Return the policy loss of a run, which is sent to the processes that compute gradients.

    Raises:
        UserError: the function cannot be imported.
    """
    if settings.loss in POLICY_LOSSES:
        return POLICY_LOSSES[settings.loss]
    loss = _load(settings.loss, "loss")
    _try_loss(loss, f"--ppo.loss {settings.loss}", limited=settings.target_kl is not None)
    return loss


def with_defaults(config: PPORun, estimator: Estimator) -> PPORun:
    """Return the configuration with the settings that depend on the estimator filled in."""
    settings = config.ppo
    critic = settings.critic or ("separate" if estimator.needs_critic else "none")
    whiten = estimator.whiten if settings.whiten_advantages is None else settings.whiten_advantages
    return dataclasses.replace(config, ppo=dataclasses.replace(settings, critic=critic, whiten_advantages=whiten))


def identify_functions(settings: PPOConfig) -> dict[str, str]:
    """Return the identity of estimator and loss: a name of the table, or a function's name and its code's digest."""
    estimator, loss = settings.estimator, settings.loss
    return {
        "estimator": estimator if estimator in ESTIMATORS else _identify(estimator),
        "loss": loss if loss in POLICY_LOSSES else _identify(loss),
    }


def _try_loss(loss: PolicyLoss, where: str, *, limited: bool) -> None:
    """Raise UserError if a user's loss fails on two tokens, or does not return what a run needs.

    Args:
        loss: the user's function.
        where: flag that names it.
        limited: True if the run has `ppo.target_kl`.
    """
    ones = torch.ones(2)
    with _user_code(where):
        result = loss(
            -ones,
            old_log_probs=-ones,
            advantages=ones,
            mask=ones.bool(),
            weights=ones,
            clip_eps=0.2,
            clip_eps_high=None,
            sequences=torch.zeros(2, dtype=torch.int64),
        )
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"it returned a {type(result).__name__}, expected a pair (loss, sums)")
        total, sums = result
        if not isinstance(total, Tensor) or total.ndim:
            raise TypeError("the loss is not a [] tensor: return a sum over tokens")
        if "count" not in sums:
            raise KeyError("the sums have no 'count', the number of tokens")
        if limited and "policy/approxkl_avg_sum" not in sums:
            raise KeyError("the sums have no 'policy/approxkl_avg_sum', whose mean --ppo.target-kl limits")
        mean_metrics(sums)


@contextlib.contextmanager
def _user_code(where: str) -> Iterator[None]:
    """Convert an exception of the user's code to a UserError with the line that raised it."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{where}: {describe_error(error)}") from error


def _load(target: str, setting: str) -> Callable[..., Any]:
    return load_function(target, f"--ppo.{setting} {target}", "it has no such name, and it is not")


def _identify(target: str) -> str:
    return f"{target.rpartition(':')[2]} {code_digest(target)}"
