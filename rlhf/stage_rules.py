"""Rules for the settings of the training stages in `rlhf.stage_config`. Importing it does not import torch."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rlhf.config import DPOConfig, ModelConfig, PPOConfig
from rlhf.estimator_rules import ESTIMATOR_RULES
from rlhf.setting_rules import Rule, flag_of

CHOSEN_BY_RULE = {
    "model": ("n_positions",),
    "sft": ("learning_rate",),
    "reward": ("learning_rate",),
    "dpo": ("learning_rate",),
    "ppo": ("learning_rate", "max_new_tokens", "missing_eos_penalty", "kl_horizon", "minibatch_size"),
}
"""Settings, by section, that a stage chooses by rule where they are None."""

_SHAPE = ("n_layer", "n_head", "n_embd", "n_positions")
"""Sizes that set all of a GPT-2's shape."""

_NO_SAMPLES = Rule(
    ("log.samples", "log.token_samples"), lambda config: not hasattr(config, "ppo"), "has no effect outside of PPO"
)


def _columns_rule(data: str) -> Rule:
    """Return the rule for columns that are named although the stage has no data file."""
    reason = "has no effect on the embedded example: name a data file"
    return Rule(("data.columns",), lambda config: getattr(config, data) is None, reason)


def _starts_elsewhere(data: str) -> Callable[[Any], bool]:
    """Return the condition that a stage runs alone on the user's data, so that no model is created before it."""
    return lambda config: not hasattr(config, "sft") and getattr(config, data) is not None


def _length_rule(stage: str) -> Rule:
    """Return the rule for a number of epochs beside a maximum number of steps."""

    def reason(config: Any) -> str:
        limit = flag_of(f"{stage}.max_steps", getattr(config, stage).max_steps)
        return f"training ends then or at {limit}, whichever is first"

    return Rule((f"{stage}.epochs",), lambda config: getattr(config, stage).max_steps is not None, reason)


def _worker_rule(stage: str, setting: str, size: str = "", *, rows: int = 1) -> Rule:
    """Return the rule for more workers than an optimiser step has micro-batches.

    Args:
        stage: section of the stage.
        setting: name of the setting for the number of records per optimiser step.
        size: name of the property with that number, if the setting may be None.
        rows: number of rows per record.
    """

    def applies(config: Any) -> bool:
        settings = getattr(config, stage)
        micro_batches = -(-rows * getattr(settings, size or setting) // settings.micro_batch_size)
        return bool(config.dist.num_workers > micro_batches)

    remedy = f"lower {flag_of(f'{stage}.micro_batch_size')}, or raise {flag_of(f'{stage}.{setting}')}"
    return Rule(("dist.num_workers",), applies, f"more workers than an update has micro-batches; {remedy}")


def _is_gpt2(model: ModelConfig) -> bool:
    """Return True if a new model is a GPT-2."""
    return model.family == "gpt2" or (model.family is None and model.preset.startswith(("tiny", "small", "gpt2")))


def _model_rules(data: str) -> tuple[Rule, ...]:
    names = ("model.family", "model.preset", "tokenizer.path", "tokenizer.vocab_size")
    return (Rule(names, _starts_elsewhere(data), "has no effect: the model that the stage starts from brings its own"),)


SFT_RULES = (
    _NO_SAMPLES,
    _columns_rule("sft_data"),
    _length_rule("sft"),
    _worker_rule("sft", "batch_size"),
    Rule(
        ("tokenizer.vocab_size",),
        lambda config: config.sft.model_path is not None,
        "has no effect with --sft.model-path, whose folder has a tokenizer; drop one of the two",
        refused=True,
    ),
    Rule(
        ("tokenizer.vocab_size",),
        lambda config: config.tokenizer.path is not None,
        "has no effect with --tokenizer.path, which has its own vocabulary; drop one of the two",
        refused=True,
    ),
    Rule(
        ("model.family", "model.preset"),
        lambda config: config.sft.model_path is not None,
        "has no effect with --sft.model-path: the folder's shape counts",
    ),
    Rule(
        ("model.preset",),
        lambda config: _is_gpt2(config.model) and None not in [getattr(config.model, name) for name in _SHAPE],
        "has no effect: the fields beside it set all of the shape",
    ),
    Rule(
        ("sft.val_fraction",),
        lambda config: config.sft_val_data is not None,
        "has no effect with --sft-val-data",
    ),
    Rule(
        ("sft.eval_every",),
        lambda config: config.sft_val_data is None and config.sft.val_fraction == 0,
        "has no effect without held-out records: set --sft.val-fraction or --sft-val-data",
    ),
)

REWARD_RULES = (
    Rule(
        ("reward.members",),
        lambda config: hasattr(config, "ppo"),
        "is not for the pipeline; run `rlhf-train reward`, then `rlhf-train ppo` with --ppo.reward and --ppo.combine",
        refused=True,
    ),
    _NO_SAMPLES,
    _columns_rule("preference_data"),
    _length_rule("reward"),
    _worker_rule("reward", "batch_size", rows=2),
    *_model_rules("preference_data"),
    Rule(
        ("reward.val_fraction",),
        lambda config: config.preference_val_data is not None,
        "has no effect with --preference-val-data",
    ),
)

DPO_RULES = (
    _columns_rule("preference_data"),
    _NO_SAMPLES,
    _length_rule("dpo"),
    _worker_rule("dpo", "batch_size", rows=2),
    *_model_rules("preference_data"),
    Rule(
        ("dpo.val_fraction",),
        lambda config: config.preference_val_data is not None,
        "has no effect with --preference-val-data",
    ),
    Rule(
        ("dpo.label_smoothing",),
        lambda config: config.dpo.loss == "ipo",
        "is of --dpo.loss sigmoid alone; drop one of the two",
        refused=True,
    ),
)


def _updates_once(ppo: PPOConfig) -> bool:
    """Return True if an iteration makes a single update, in which every ratio is 1."""
    return ppo.num_epochs == 1 and ppo.update_size >= ppo.iteration_size


def _has_no_warmup_step(ppo: PPOConfig) -> bool:
    minibatches = -(-ppo.iteration_size // ppo.update_size)
    updates = (ppo.num_iterations - ppo.critic_warmup) * ppo.num_epochs * minibatches
    return 0 < ppo.warmup_fraction * updates < 1


PPO_RULES = (
    Rule(
        tuple(f"dpo.{spec.name}" for spec in dataclasses.fields(DPOConfig)),
        lambda config: True,
        "has no effect in the pipeline, which ends with PPO; run `rlhf-train dpo`",
    ),
    _columns_rule("prompt_data"),
    _worker_rule("ppo", "minibatch_size", "update_size"),
    *_model_rules("prompt_data"),
    Rule(
        ("log.token_samples",),
        lambda config: config.log.token_samples > config.log.samples,
        "no more than the --log.samples completions are written",
    ),
    Rule(
        ("log.samples",),
        lambda config: config.log.samples > config.ppo.iteration_size,
        "an iteration has no more completions than --ppo.batch-size times --ppo.samples-per-prompt",
    ),
    Rule(
        ("ppo.rollout_slots",),
        lambda config: config.ppo.rollout_slots > config.ppo.rollout_batch_size,
        "a micro-batch has no more completions than --ppo.rollout-batch-size",
    ),
    Rule(
        ("ppo.min_new_tokens",),
        lambda config: not config.ppo.stop_at_eos,
        "has no effect with --ppo.no-stop-at-eos: every completion has --ppo.max-new-tokens",
    ),
    Rule(
        ("ppo.missing_eos_penalty",),
        lambda config: not config.ppo.stop_at_eos,
        "has no effect with --ppo.no-stop-at-eos: no completion is expected to end by itself",
    ),
    Rule(
        ("ppo.bootstrap_truncated",),
        lambda config: not config.ppo.stop_at_eos,
        "has no effect with --ppo.no-stop-at-eos: every completion ends at --ppo.max-new-tokens",
    ),
    *ESTIMATOR_RULES,
    Rule(("ppo.top_p",), lambda config: config.ppo.top_k == 1, "has no effect with --ppo.top-k 1"),
    Rule(
        ("ppo.normalize_reward",),
        lambda config: bool(config.ppo.reward) and all(":" in source for source in config.ppo.reward),
        "has no effect on Python functions, whose scores are taken as they are",
    ),
    Rule(
        ("ppo.kl_adaptive",),
        lambda config: config.ppo.kl_coef == 0,
        "a --ppo.kl-coef of 0 stays 0 when it is multiplied; give it a start above 0",
        refused=True,
    ),
    Rule(
        ("ppo.kl_target", "ppo.kl_horizon"),
        lambda config: not config.ppo.kl_adaptive,
        "has no effect without --ppo.kl-adaptive (--ppo.target-kl stops updates early)",
        refused=True,
    ),
    Rule(
        ("ppo.kl_budget",),
        lambda config: config.ppo.kl_coef == 0,
        "a --ppo.kl-coef of 0 stays 0 when it is raised; give it a start above 0",
        refused=True,
    ),
    Rule(
        ("ppo.kl_budget",),
        lambda config: config.ppo.kl_adaptive,
        "has no effect with --ppo.kl-adaptive, which aims at --ppo.kl-target",
    ),
    Rule(
        ("ppo.kl_estimator", "ppo.kl_in_loss"),
        lambda config: config.ppo.kl_coef == 0,
        "has no effect with --ppo.kl-coef 0",
    ),
    Rule(
        ("ppo.clip_eps", "ppo.clip_eps_high", "ppo.dual_clip", "ppo.value_clip_eps", "ppo.target_kl"),
        lambda config: _updates_once(config.ppo),
        "has no effect with one update per iteration, before which nothing has moved",
    ),
    Rule(
        ("ppo.value_clip_eps", "ppo.critic_warmup"),
        lambda config: config.ppo.value_coef == 0,
        "has no effect with --ppo.value-coef 0: the value function does not learn",
    ),
    Rule(
        ("ppo.warmup_fraction",),
        lambda config: _has_no_warmup_step(config.ppo),
        "has no effect: it is less than one of the run's updates",
    ),
)
