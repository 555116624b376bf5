"""PPO's work as a `Program`: what is trained, what is frozen, and the pure functions over micro-batches."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf.config import PPOConfig
from rlhf.execution.compiled import compiled
from rlhf.execution.draws import compiled_draw
from rlhf.execution.executor import Models, Program, StepSpec
from rlhf.gpt2_config import GPT2Config
from rlhf.heads import init_value_head, value_head_from_reward
from rlhf.io.model_folder import LanguageModel, RewardModel
from rlhf.objectives import make_ppo_objective, make_rollout, make_scorer
from rlhf.sampling import draw_tokens
from rlhf.schedules import Schedule
from rlhf.stages.inputs import make_schedule
from rlhf.stages.supervised import make_adamw
from rlhf.tree import tree_map
from rlhf.types import Params


class Shapes(NamedTuple):
    """The models involved."""

    policy: GPT2Config
    critic: GPT2Config | None
    """The separate critic's; None with a value head on the policy."""
    reward_models: tuple[GPT2Config, ...]
    eos_id: int


def shapes_of(settings: PPOConfig, policy: LanguageModel, reward_models: Sequence[RewardModel]) -> Shapes:
    """The shapes of a policy, of frozen scorers, and of the critic that starts from the first of them."""
    critic = None
    if settings.critic == "separate":
        critic = reward_models[0].config if reward_models else policy.config
    return Shapes(policy.config, critic, tuple(model.config for model in reward_models), policy.tokenizer.eos_id)


def start_models(settings: PPOConfig, policy: LanguageModel, reward_models: Sequence[RewardModel]) -> Models:
    """Policy and value function; reference and reward models, frozen.

    Args:
        settings: the ppo section.
        policy: the SFT model: where the policy starts, and the reference.
        reward_models: frozen scorers; the first is where a separate critic starts.
    """
    critic = reward_models[0] if reward_models else None
    frozen = {f"reward_model_{n}": model.params for n, model in enumerate(reward_models)}
    return Models(
        {"policy": policy.params} | _value_function(settings, policy, critic), {"reference": policy.params} | frozen
    )


def update_schedule(settings: PPOConfig) -> Schedule:
    """The learning rate of the updates after the critic's warm-up."""
    completions = settings.batch_size * settings.samples_per_prompt
    updates = settings.num_epochs * -(-completions // settings.minibatch_size)
    return make_schedule(settings, (settings.num_iterations - settings.critic_warmup) * updates)


def recomputes_log_probs(settings: PPOConfig, dtype: torch.dtype) -> bool:
    """Whether the scorer's log-probs (and values of a head on the policy) replace those captured while sampling."""
    return settings.recompute_log_probs if settings.recompute_log_probs is not None else dtype == torch.bfloat16


def make_program(shapes: Shapes, settings: PPOConfig, dtype: torch.dtype, compile_to: Path | None = None) -> Program:
    """PPO's work: `rollout` and `score`, then `ppo` steps, or `critic` steps while it warms up.

    Args:
        shapes: of the models.
        settings: the ppo section.
        dtype: of the models' passes.
        compile_to: see `Program`.
    """
    schedule = update_schedule(settings)
    objective = functools.partial(
        make_ppo_objective,
        shapes.policy,
        shapes.critic,
        dtype=dtype,
        temperature=settings.temperature,
        clip_eps=settings.clip_eps,
        dual_clip=settings.dual_clip,
        value_clip_eps=settings.value_clip_eps,
        value_coef=settings.value_coef,
        entropy_coef=settings.entropy_coef,
        loss_kl=settings.kl_estimator if settings.kl_in_loss else "none",
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    score = make_scorer(
        shapes.policy,
        shapes.critic,
        shapes.reward_models,
        dtype=dtype,
        temperature=settings.temperature,
        log_probs=recomputes_log_probs(settings, dtype),
    )
    warmup_adamw = make_adamw(
        settings, lambda step: schedule(step * 0), lambda name: float(not name.startswith("policy."))
    )
    return Program(
        steps={
            "ppo": StepSpec(objective(), make_adamw(settings, schedule), settings.max_grad_norm),
            "critic": StepSpec(objective(policy_coef=0.0), warmup_adamw, settings.max_grad_norm),
        },
        maps={
            "rollout": make_rollout(
                shapes.policy,
                dtype=dtype,
                max_new_tokens=settings.max_new_tokens,
                min_new_tokens=settings.min_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                stop_tokens=(shapes.eos_id,) if settings.stop_at_eos else (),
                slots=settings.rollout_slots,
                draw=draw_tokens if compile_to is None else compiled_draw(compile_to),
            ),
            "score": score if compile_to is None else compiled(score, compile_to),
        },
        blends={} if settings.ref_ema is None else {"reference": _follow(settings.ref_ema)},
        compile_to=compile_to,
    )


def _value_function(settings: PPOConfig, policy: LanguageModel, reward_model: RewardModel | None) -> Params:
    """The value head, or a separate critic that starts by predicting the score where there is a reward model."""
    if settings.critic == "shared":
        return {"value_head": init_value_head(policy.config.n_embd)}
    if reward_model is None:
        return {"critic": {"trunk": policy.params, "head": init_value_head(policy.config.n_embd)}}
    mean, std, _ = reward_model.statistics if settings.normalize_reward else (0.0, 1.0, 0)
    head = value_head_from_reward(reward_model.params["head"], mean=mean, std=std)
    return {"critic": {"trunk": reward_model.params["trunk"], "head": head}}


def _follow(decay: float) -> Callable[[Params, Params], Params]:
    """A reference that moves towards the policy."""

    def blend(reference: Params, params: Params) -> Params:
        moved: Params = tree_map(lambda old, new: decay * old + (1.0 - decay) * new, reference, params["policy"])
        return moved

    return blend
