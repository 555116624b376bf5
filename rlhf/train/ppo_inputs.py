"""Inputs of PPO: the policy, the reward sources, and the context that all models can read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf.config import PPORun
from rlhf.errors import UserError
from rlhf.io.files import check_folder
from rlhf.io.reward_sources import RewardSource, check_vocabulary, expand_sources, names_folder, open_sources
from rlhf.stages import STAGES
from rlhf.train.compile_policy import compile_obstacle
from rlhf.train.context import Run
from rlhf.train.stage_defaults import (
    choose_settings,
    default_eos_penalty,
    default_rate,
    describe_start,
    fit_completion,
    start_facts,
)
from rlhf.train.stage_inputs import ModelSpec, start_folder, start_model_spec


class PPOInputs(NamedTuple):
    """Inputs of PPO, without the parameters of the policy."""

    policy: ModelSpec
    sources: list[RewardSource]
    context: int
    """Maximum number of tokens of prompt and completion: the shortest context of the models that read them."""


def read_ppo_inputs(config: PPORun, sft: ModelSpec | None = None, reward: ModelSpec | None = None) -> PPOInputs:
    """Return the inputs of PPO, after checking that they work together.

    Args:
        config: configuration of the stage.
        sft: spec of the future OUTPUT_DIR/sft, if it is trained first.
        reward: spec of the future OUTPUT_DIR/reward, if it is trained first.

    Raises:
        UserError: a model or source is missing or does not fit, or the longest completion leaves no room for a prompt.
    """
    settings = config.ppo
    compile_obstacle(config, STAGES["ppo"])
    policy = start_model_spec(config, settings.model_path, "--ppo.model-path", sft)
    reward_folder = _reward_folder(config)
    if not settings.reward and reward is None:
        remedy = "name a reward: --ppo.reward FOLDER or --ppo.reward module:function"
        check_folder(reward_folder, f"run `rlhf-train reward` first, or {remedy}")
    sources = open_sources(reward_specs(config), policy.tokenizer, untrained=None if reward is None else reward_folder)
    if reward is not None and scores_with_own_model(config):
        check_vocabulary(reward_folder, reward.tokenizer, policy.tokenizer)
    _check_ensemble(config, sources)
    contexts = [(source, source.model.config.n_positions) for source in sources if source.model is not None]
    if reward is not None:
        contexts += [(source, reward.config.n_positions) for source in sources if source.untrained]
    context = min([policy.config.n_positions, *(length for source, length in contexts if source.weight)])
    for source, length in contexts:
        if length < context:
            raise UserError(
                f"--ppo.reward: the gold model {source.name} reads {length} tokens, but prompt and completion may have "
                f"{context}; cutting them would change the training: leave it out, or evaluate with it afterwards"
            )
    for name in ("max_new_tokens", "min_new_tokens"):
        tokens = getattr(settings, name)
        if tokens is not None and context <= tokens:
            raise UserError(f"ppo.{name} is {tokens}: no room for a prompt in a context of {context}; lower it")
    return PPOInputs(policy, sources, context)


def choose_ppo_settings(run: Run, config: PPORun, context: int) -> PPORun:
    """Return the configuration with the settings that follow from the policy's model, its demonstrations and the batch.

    Args:
        run: run of the stage.
        config: configuration of the run.
        context: longest sequence that all models can read, in tokens.
    """
    settings, facts = config.ppo, start_facts(start_folder(config, config.ppo.model_path))
    length = settings.max_new_tokens or max(fit_completion(facts.completion_tokens, context), settings.min_new_tokens)
    chosen = {
        "ppo.learning_rate": default_rate(settings, pretrained=facts.pretrained),
        "ppo.max_new_tokens": length,
        "ppo.missing_eos_penalty": default_eos_penalty(settings, facts, length),
        "ppo.minibatch_size": settings.update_size,
        "ppo.kl_horizon": settings.horizon if settings.kl_adaptive else None,
    }
    known: PPORun = choose_settings(run, config, chosen, f"{describe_start(facts)}, its demonstrations and the batch")
    return known


def _check_ensemble(config: PPORun, sources: Sequence[RewardSource]) -> None:
    """Raise UserError if there is an ensemble to combine and it has fewer than two models, or several weights."""
    members = [source for source in sources if source.weight and (source.model is not None or source.untrained)]
    flag = f"--ppo.combine {config.ppo.combine}"
    if config.ppo.combine != "sum" and len(members) < 2:
        raise UserError(f"{flag}: combines reward models, of which there is {len(members)}; name two or more")
    if config.ppo.combine != "sum" and len({source.weight for source in members}) > 1:
        raise UserError(f"{flag}: the members {', '.join(m.name for m in members)} have different weights; drop them")


def scores_with_own_model(config: PPORun) -> bool:
    """Return True if the model in OUTPUT_DIR/reward is one of the reward sources."""
    return any(names_folder(spec, _reward_folder(config)) for spec in reward_specs(config))


def reward_specs(config: PPORun) -> tuple[str, ...]:
    """Return the named reward sources with `*` expanded, or OUTPUT_DIR/reward if none is named."""
    return tuple(expand_sources(config.ppo.reward)) or (str(_reward_folder(config)),)


def _reward_folder(config: PPORun) -> Path:
    return config.output_dir / STAGES["reward"].folder
