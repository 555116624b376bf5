"""Rules for PPO's estimator, critic and policy loss: what belongs together. Importing it imports no torch."""

from collections.abc import Sequence
from typing import Any

from rlhf.setting_rules import Rule


def _estimator(config: Any) -> Any:
    """Return the registered estimator of a configuration, or None."""
    from rlhf.estimators import ESTIMATORS  # which imports torch

    return ESTIMATORS.get(config.ppo.estimator)


def _is_registered(config: Any) -> bool:
    return _estimator(config) is not None or ":" in config.ppo.estimator


def _needs_critic(config: Any) -> bool:
    estimator = _estimator(config)
    return estimator is not None and estimator.needs_critic


def _estimators(needs_critic: Sequence[bool]) -> str:
    """Return the names of the registered estimators whose `needs_critic` is one of the values, as a text."""
    from rlhf.estimators import ESTIMATORS

    return ", ".join(name for name, estimator in ESTIMATORS.items() if estimator.needs_critic in needs_critic)


def _has_no_critic(config: Any) -> bool:
    return bool(config.ppo.critic == "none" or (config.ppo.critic is None and not _needs_critic(config)))


def _compares_groups(config: Any) -> bool:
    estimator = _estimator(config)
    return estimator is not None and estimator.compares_groups


def _is_online_dpo(config: Any) -> bool:
    return bool(config.ppo.estimator == "online-dpo")


def _knows_loss(config: Any) -> bool:
    from rlhf.policy_losses import POLICY_LOSSES

    return config.ppo.loss in POLICY_LOSSES or ":" in config.ppo.loss


ESTIMATOR_RULES = (
    Rule(
        ("ppo.estimator",),
        lambda config: not _is_registered(config),
        lambda config: (
            f"there is no such estimator; there are: {_estimators((True, False))}, module:function, file.py:function"
        ),
        refused=True,
    ),
    Rule(
        ("ppo.loss",),
        lambda config: not _knows_loss(config),
        "there is no such loss; there are: ppo, cispo, gspo, module:function, file.py:function",
        refused=True,
    ),
    Rule(
        ("ppo.dual_clip",),
        lambda config: config.ppo.loss != "ppo",
        "is of --ppo.loss ppo alone; drop one of the two",
        refused=True,
    ),
    Rule(
        ("ppo.estimator",),
        lambda config: _compares_groups(config) and config.ppo.samples_per_prompt < 2,
        "compares the completions of a prompt, of which there is 1; raise --ppo.samples-per-prompt, for example to 4",
        refused=True,
    ),
    Rule(
        ("ppo.estimator",),
        lambda config: _is_online_dpo(config) and config.ppo.samples_per_prompt != 2,
        "compares two completions of a prompt; set --ppo.samples-per-prompt 2",
        refused=True,
    ),
    Rule(
        ("ppo.estimator",),
        lambda config: (
            _is_online_dpo(config) and config.ppo.num_epochs * config.ppo.iteration_size > config.ppo.update_size
        ),
        lambda config: (
            "has the gradient of DPO in the first update of an iteration alone; set --ppo.num-epochs 1 "
            f"--ppo.minibatch-size {config.ppo.iteration_size}"
        ),
        refused=True,
    ),
    Rule(
        ("ppo.kl_in_loss", "ppo.kl_estimator", "ppo.whiten_rewards", "ppo.loss"),
        _is_online_dpo,
        "changes what --ppo.estimator online-dpo computes, the gradient of DPO; drop it",
        refused=True,
    ),
    Rule(
        ("ppo.whiten_advantages",),
        lambda config: _is_online_dpo(config) and config.ppo.whiten_advantages,
        "changes what --ppo.estimator online-dpo computes, the gradient of DPO; drop it",
        refused=True,
    ),
    Rule(
        ("ppo.loss_per",),
        lambda config: _is_online_dpo(config) and config.ppo.loss_per == "sequence",
        "weighs the two completions of a pair unequally, unlike DPO; take token or constant",
        refused=True,
    ),
    Rule(
        ("ppo.kl_coef",),
        lambda config: _is_online_dpo(config) and config.ppo.kl_coef == 0,
        "is the beta of --ppo.estimator online-dpo, which is above 0; set it, for example to 0.1",
        refused=True,
    ),
    Rule(
        ("ppo.uncertainty_coef",),
        lambda config: config.ppo.combine != "uncertainty",
        "has no effect without --ppo.combine uncertainty",
    ),
    Rule(
        ("ppo.drop_equal_groups",),
        lambda config: config.ppo.samples_per_prompt < 2,
        "leaves no completion to learn from: every prompt has 1; raise --ppo.samples-per-prompt",
        refused=True,
    ),
    Rule(
        ("ppo.kl_importance_weighting",),
        lambda config: not config.ppo.kl_in_loss or config.ppo.kl_estimator == "exact",
        "has no effect without --ppo.kl-in-loss and an estimator k1, k2 or k3",
        refused=True,
    ),
    Rule(
        ("ppo.critic",),
        lambda config: _has_no_critic(config) and _needs_critic(config),
        lambda config: (
            f"the estimator {config.ppo.estimator} reads values; take shared or separate, or an estimator that "
            f"reads none: {_estimators((False,)) or 'none is registered'}"
        ),
        refused=True,
    ),
    Rule(
        ("ppo.critic",),
        lambda config: not _has_no_critic(config) and not _needs_critic(config),
        lambda config: (
            f"the estimator {config.ppo.estimator} reads no values, which a critic would learn in vain; leave it out"
        ),
        refused=True,
    ),
    Rule(
        ("ppo.critic_warmup", "ppo.bootstrap_truncated"),
        _has_no_critic,
        lambda config: f"asks for values, of which the estimator {config.ppo.estimator} has none; drop it",
        refused=True,
    ),
    Rule(
        ("ppo.critic_max_grad_norm",),
        lambda config: config.ppo.critic == "shared",
        "clips a separate critic; a shared one has the policy's weights, which --ppo.max-grad-norm clips: drop it, or "
        "take --ppo.critic separate",
        refused=True,
    ),
    Rule(
        ("ppo.value_coef", "ppo.value_clip_eps", "ppo.lam", "ppo.critic_learning_rate", "ppo.critic_max_grad_norm"),
        _has_no_critic,
        lambda config: f"has no effect with the estimator {config.ppo.estimator}, which has no critic",
    ),
    Rule(
        ("ppo.gamma",),
        _compares_groups,
        "has no effect on the scores of whole completions",
    ),
)
