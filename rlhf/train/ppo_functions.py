"""The estimator and the policy loss of a PPO run: by name, or Python functions of the user."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rlhf.config import PPOConfig, PPORun
from rlhf.estimators import ESTIMATORS, Estimator
from rlhf.io.reward_identity import code_digest
from rlhf.io.user_functions import load_function
from rlhf.policy_losses import POLICY_LOSSES, PolicyLoss


def open_estimator(settings: PPOConfig) -> Estimator:
    """Return the estimator of a run.

    A function of the user takes `rlhf.estimators.RewardedCompletions` and returns an `AdvantageEstimate` without
    returns, as those of the table do; it reads no values, and its advantages are taken as they are.

    Raises:
        UserError: the function cannot be imported.
    """
    name = settings.estimator
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    return Estimator(name, _load(name, "estimator"), needs_critic=False, whiten=False)


def open_policy_loss(settings: PPOConfig) -> PolicyLoss:
    """Return the policy loss of a run; every process that computes gradients loads a user's function by itself.

    Raises:
        UserError: the function cannot be imported.
    """
    return POLICY_LOSSES.get(settings.loss) or _load(settings.loss, "loss")


def with_defaults(config: PPORun) -> PPORun:
    """Return the configuration with the settings that depend on the estimator filled in."""
    settings, estimator = config.ppo, open_estimator(config.ppo)
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


def _load(target: str, setting: str) -> Callable[..., Any]:
    return load_function(target, f"--ppo.{setting} {target}", "it has no such name, and it is not")


def _identify(target: str) -> str:
    return f"{target.rpartition(':')[2]} {code_digest(target)}"
