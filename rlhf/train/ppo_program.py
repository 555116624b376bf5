"""The `Program` of PPO: trained and frozen models, and pure functions over micro-batches."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf.config import PPOConfig
from rlhf.execution.compiled import compiled
from rlhf.execution.draws import compiled_draw
from rlhf.execution.program import MetricLimit, ModelState, Program, StepSpec
from rlhf.generate.complete import make_completion_fn
from rlhf.io.model_folder import LanguageModel
from rlhf.io.reward_sources import RewardSource
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.decode_state import decode_steps
from rlhf.models.heads import init_value_head, value_head_from_reward
from rlhf.models.output_layer import without_output_layer
from rlhf.models.scoring import make_frozen_cast, make_scorer, reward_model_shapes
from rlhf.policy_losses import PolicyLoss
from rlhf.schedules import constant_schedule
from rlhf.train.ppo_objective import make_ppo_objective
from rlhf.train.stage_inputs import lr_at_step, make_schedule
from rlhf.train.supervised import make_adamw
from rlhf.tree import tree_map, tree_map_named
from rlhf.types import Params, Tree


class ModelShapes(NamedTuple):
    """Shapes of the models of a run."""

    policy: ModelShape
    critic: ModelShape | None
    """Shape of a separate critic. None with a value head on the policy, or without a critic."""
    reward_models: tuple[ModelShape, ...]
    stop_ids: tuple[int, ...]
    """Ids of the tokens that end a completion."""


def shapes_of(settings: PPOConfig, policy: LanguageModel, sources: Sequence[RewardSource]) -> ModelShapes:
    """Return the shapes of the policy, of the reward models among the sources, and of a separate critic."""
    critic, source = None, critic_source(sources)
    if settings.critic == "separate":
        critic = (
            source.model.config
            if source and source.model
            else architecture_of(policy.config).trunk_shape(policy.config)
        )
    reward_models = tuple(source.model.config for source in sources if source.model is not None)
    return ModelShapes(policy.config, critic, reward_models, policy.tokenizer.stop_ids)


def start_models(settings: PPOConfig, policy: LanguageModel, sources: Sequence[RewardSource]) -> ModelState:
    """Return the initial state: policy and value function, and frozen reference and reward models.

    Args:
        settings: settings of the ppo section.
        policy: SFT model, from which the policy starts and which is the reference.
        sources: reward sources. A separate critic starts from their `critic_source`.
    """
    reward_models = [source.model for source in sources if source.model is not None]
    frozen = {f"reward_model_{n}": model.params for n, model in enumerate(reward_models)}
    value_function = _value_function(settings, policy, critic_source(sources))
    return ModelState({"policy": policy.params} | value_function, {"reference": policy.params} | frozen)


def critic_source(sources: Sequence[RewardSource]) -> RewardSource | None:
    """Return the first source with a reward model and a weight other than 0, from which a critic starts, or None."""
    return next((source for source in sources if source.model is not None and source.weight), None)


def updates_per_iteration(settings: PPOConfig) -> int:
    """Return the number of minibatches of an iteration, over all its epochs."""
    return settings.num_epochs * -(-settings.iteration_size // settings.update_size)


def learning_rate(settings: PPOConfig, iteration: int, minibatch: int) -> float:
    """Return the learning rate of an update: the full rate while the critic warms up, then that of the schedule.

    The schedule also counts minibatches that `target_kl` skips, so that it always reaches its end.

    Args:
        settings: settings of the ppo section.
        iteration: number of the iteration, counted from 0.
        minibatch: number of the minibatch in the iteration, counted from 0.
    """
    per_iteration = updates_per_iteration(settings)
    iterations = settings.num_iterations - settings.critic_warmup
    if iteration < settings.critic_warmup:
        return settings.peak_learning_rate
    schedule = make_schedule(settings, iterations * per_iteration)
    return lr_at_step(schedule, (iteration - settings.critic_warmup) * per_iteration + minibatch)


def recomputes_log_probs(settings: PPOConfig, dtype: torch.dtype) -> bool:
    """Return True if a forward pass recomputes the log-probs and values of the sampled tokens."""
    return settings.recompute_log_probs if settings.recompute_log_probs is not None else dtype == torch.bfloat16


def make_ppo_program(
    shapes: ModelShapes,
    settings: PPOConfig,
    policy_loss: PolicyLoss,
    dtype: torch.dtype,
    compile_to: Path | None = None,
) -> Program:
    """Return the program of PPO: `rollout` and `score`, `ppo` steps, and `critic` steps for the warm-up of the critic.

    Args:
        shapes: shapes of the models.
        settings: settings of the ppo section.
        policy_loss: loss of the policy.
        dtype: dtype of forward and backward passes.
        compile_to: folder of compiled code. None runs eagerly.
    """
    rate = constant_schedule(settings.peak_learning_rate)  # replaced in every step by `learning_rate`
    limit = None if settings.target_kl is None else MetricLimit("policy/approxkl_avg", settings.target_kl)
    objective = functools.partial(
        make_ppo_objective,
        shapes.policy,
        shapes.critic,
        dtype=dtype,
        temperature=settings.temperature,
        policy_loss=policy_loss,
        clip_eps=settings.clip_eps,
        clip_eps_high=settings.clip_eps_high,
        dual_clip=settings.dual_clip,
        value_clip_eps=settings.value_clip_eps,
        value_coef=settings.value_coef,
        entropy_coef=settings.entropy_coef,
        loss_kl=settings.kl_estimator if settings.kl_in_loss else "none",
        weight_kl=settings.kl_importance_weighting,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    score = make_scorer(
        shapes.policy,
        shapes.critic,
        shapes.reward_models,
        dtype=dtype,
        temperature=settings.temperature,
        log_probs=recomputes_log_probs(settings, dtype),
        bootstrap=settings.bootstrap_truncated,
    )
    adamw = make_adamw(settings, rate, _lr_multiplier(settings, policy=1.0))
    max_norm: float | dict[str, float] = settings.max_grad_norm
    if settings.critic != "none" and settings.critic_max_grad_norm is not None:
        max_norm = {"policy": settings.max_grad_norm, "critic": settings.critic_max_grad_norm}
    steps = {"ppo": StepSpec(objective(), adamw, max_norm, limit)}
    if settings.critic != "none":
        warmup_adamw = make_adamw(settings, rate, _lr_multiplier(settings, policy=0.0))
        steps["critic"] = StepSpec(objective(policy_coef=0.0), warmup_adamw, max_norm)
    frozen_shapes = {"reference": shapes.policy, **reward_model_shapes(shapes.reward_models)}
    return Program(
        steps=steps,
        eval_fns={
            "rollout": make_completion_fn(
                shapes.policy,
                dtype=dtype,
                max_new_tokens=settings.completion_tokens,
                min_new_tokens=settings.min_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                stop_tokens=shapes.stop_ids if settings.stop_at_eos else (),
                max_concurrent=settings.rollout_slots,
                draw=decode_steps if compile_to is None else compiled_draw(compile_to),
            ),
            "score": score if compile_to is None else compiled(score, compile_to),
        },
        frozen_updates={} if settings.ref_ema is None else {"reference": _make_ema_update(settings.ref_ema)},
        # compiled code casts at no cost, but rounds differently: policy and reference must be cast in the same place
        prepare_frozen=make_frozen_cast(frozen_shapes, torch.float32 if compile_to else dtype),
        compile_to=compile_to,
    )


def _lr_multiplier(settings: PPOConfig, policy: float) -> Callable[[Tree], Tree] | None:
    """Return a function params -> factors on the learning rate, or None if all are 1. `policy` is the policy's."""
    rate = settings.critic_learning_rate
    critic = 1.0 if rate is None else rate / settings.peak_learning_rate
    if policy == critic == 1.0:
        return None
    return functools.partial(tree_map_named, lambda name, leaf: policy if name.startswith("policy.") else critic)


def _value_function(settings: PPOConfig, policy: LanguageModel, source: RewardSource | None) -> Params:
    """Return a value head, a separate critic that initially predicts the scores of its source, or nothing."""
    if settings.critic == "none":
        return {}
    if settings.critic == "shared":
        return {"value_head": init_value_head(policy.config.n_embd)}
    if source is None or source.model is None:
        return {"critic": {"trunk": without_output_layer(policy.params), "head": init_value_head(policy.config.n_embd)}}
    params, statistics = source.model.params, source.model.statistics
    mean, std, _ = statistics if settings.normalize_reward else (0.0, 1.0, 0)
    head = value_head_from_reward(params["head"], mean=mean, std=std, weight=source.weight)
    return {"critic": {"trunk": params["trunk"], "head": head}}


def _make_ema_update(decay: float) -> Callable[[Params, Params], Params]:
    """Return a function (reference, params) -> exponential moving average of the reference and the policy."""

    def update_frozen(reference: Params, params: Params) -> Params:
        average: Params = tree_map(lambda old, new: decay * old + (1.0 - decay) * new, reference, params["policy"])
        return average

    return update_frozen
