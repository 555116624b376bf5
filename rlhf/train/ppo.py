"""PPO with a KL penalty, which trains an SFT model on a reward.

Each iteration completes a batch of prompts, scores the completions, computes advantages from scores and KL, and makes
several epochs of minibatch updates. The method follows Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593),
Stiennon et al. 2020 and the details of Huang et al. 2024 (https://arxiv.org/abs/2403.17031). Metrics have the names
that TRL uses.
"""

import functools
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rlhf.batches import PPOBatch
from rlhf.config import PPORun
from rlhf.data.collate import Prefetch, ppo_batch
from rlhf.data.data_files import Source
from rlhf.data.encoding import chat_tokenizer
from rlhf.data.schema import PROMPTS
from rlhf.estimators import Estimator
from rlhf.experience import Experience, make_experience
from rlhf.group_baselines import equal_groups
from rlhf.io.model_folder import RewardModel, RewardStatistics, load_language_model, save_language_model
from rlhf.io.reward_identity import identify_sources
from rlhf.io.reward_sources import RewardSource, check_columns
from rlhf.kl import adaptive_kl_coef, budget_kl_coef
from rlhf.random import Purpose, fold_in, permutation
from rlhf.stages import STAGES, StageProgram, StageResult, check_settings
from rlhf.statistics import spread
from rlhf.train.compile_policy import compile_folder
from rlhf.train.context import Run, open_run
from rlhf.train.loop import train
from rlhf.train.observers import LoopState, Observer, Observers
from rlhf.train.ppo_functions import identify_functions, open_estimator, open_policy_loss, with_defaults
from rlhf.train.ppo_inputs import choose_ppo_settings, read_ppo_inputs, reward_specs, scores_with_own_model
from rlhf.train.ppo_program import learning_rate, make_ppo_program, shapes_of, start_models
from rlhf.train.ppo_rollout import PPO, Rollout, Scored, make_rollout, pack_rollout, sample_lines, score_rollout
from rlhf.train.ppo_verdict import SCORES, conclude_ppo
from rlhf.train.resume import Identity, digests_of
from rlhf.train.signals import StopRequest
from rlhf.train.stage_defaults import start_facts
from rlhf.train.stage_inputs import (
    ModelSpec,
    check_conversations,
    check_data,
    embedded_file,
    given_files,
    open_dataset,
    start_folder,
)
from rlhf.weighting import loss_weights

_MIN_SCALE = 1e-2
"""Lower bound of the magnitude of the summands of a score, whose sum may be close to 0."""

_STAGE = STAGES["ppo"]


def run_ppo(config: PPORun, observers: Sequence[Observer] = (), stop: StopRequest | None = None) -> StageResult:
    """Align OUTPUT_DIR/sft to the reward and write OUTPUT_DIR/policy.

    Args:
        config: configuration of the run.
        observers: observers of the training.
        stop: request to stop the run.

    Raises:
        UserError, NonFiniteError, Interrupted, WorkersLostError: the reasons are those of `rlhf.train.loop.train`.
    """
    check_settings(config, _STAGE)
    estimator = open_estimator(config.ppo)
    config = with_defaults(config, estimator)
    with open_run(config, _STAGE, observers, stop) as run:
        ppo, identity = _open(run, config, estimator)
        last_metrics: dict[str, float] = {}

        def advance(step: int, state: LoopState, observers: Observers) -> tuple[dict[str, float], LoopState]:
            metrics, state = _iterate(ppo, step, state, observers)
            last_metrics.update(metrics)
            return metrics, state

        train(
            run,
            ppo.executor,
            total=config.ppo.num_iterations,
            state={"kl_coef": config.ppo.kl_coef},
            identity=identity,
            advance=advance,
            kl_budget=config.ppo.active_kl_budget,
        )
        return StageResult(_save(ppo, config, identity), last_metrics, verdict=conclude_ppo(run, ppo.settings))


def check_ppo(config: PPORun, models: Mapping[str, ModelSpec]) -> ModelSpec:
    """Return the spec of the policy after checking settings, models and all prompts, as `StageProgram.check`."""
    open_estimator(config.ppo), open_policy_loss(config.ppo)
    inputs = read_ppo_inputs(config, models.get("sft"), models.get("reward"))
    path = given_files(config, config.prompt_data)
    check_columns(inputs.sources, check_data(PROMPTS, path))
    check_conversations(config, [path], PROMPTS, inputs.policy.tokenizer)
    return inputs.policy


def _needs(config: PPORun) -> tuple[str, ...]:
    if config.ppo.model_path:
        return ()
    return ("sft", "reward") if scores_with_own_model(config) else ("sft",)


def _open(run: Run, config: PPORun, estimator: Estimator) -> tuple[PPO, Identity]:
    """Return the arguments of the iterations and the identity of the run, from models, reward sources and prompts."""
    model_spec, sources, context = read_ppo_inputs(config)
    config = choose_ppo_settings(run, config, context)
    sources = [_without_rounding_std(run, source) for source in sources] if config.ppo.normalize_reward else sources
    settings, specs, folder = config.ppo, reward_specs(config), start_folder(config, config.ppo.model_path)
    policy = load_language_model(folder)
    policy = policy._replace(tokenizer=chat_tokenizer(policy.tokenizer, config.data))
    reward_notes = [line for source in sources if source.model is not None for line in source.model.notes]
    for line in dict.fromkeys((*policy.notes, *reward_notes)):
        run.note(line)
    path: Source = given_files(config, config.prompt_data) or embedded_file(run, "prompts")
    prompts = open_dataset(run, path, PROMPTS, policy.tokenizer, context - settings.completion_tokens)
    check_columns(sources, prompts.keys)
    run.note(f"{len(prompts)} prompts; policy and reference from {folder}; reward: {' + '.join(specs)}")
    shapes = shapes_of(settings, policy, sources)
    models = start_models(settings, policy, sources)
    completions = settings.num_iterations * settings.iteration_size
    tokens = settings.num_epochs * completions * (prompts.mean_tokens(context) + settings.completion_tokens)
    optimised = [source.model.params for source in sources if source.model is not None and source.weight]
    compile_to = compile_folder(
        run, models.params, tokens, evaluated=[models.params, models.frozen["reference"], *optimised]
    )
    loss = open_policy_loss(settings)  # here, so that workers on other machines need no file of the user
    executor = run.open_executor(
        functools.partial(make_ppo_program, shapes, settings, loss, run.dtype, compile_to), models
    )
    ppo = PPO(run, settings, estimator, policy, shapes, prompts, sources, executor, context)
    weighted = [source for source in sources if source.weight]
    if settings.normalize_reward and len(weighted) == 1 and weighted[0].model is not None and weighted[0].weight == 1:
        run.units = dict.fromkeys(SCORES, "standard deviations per completion")
    digests = digests_of(path, policy.tokenizer)
    functions = identify_functions(settings)
    return ppo, digests | functions | {"model": model_spec.digest, "sources": identify_sources(specs)}


def _without_rounding_std(run: Run, source: RewardSource) -> RewardSource:
    """Return the source. If its standard deviation is no larger than rounding errors, warn and replace it by 1."""
    if source.model is None:
        return source
    statistics = source.model.statistics
    size = max(abs(statistics.mean), _MIN_SCALE)
    if spread(statistics.std, size):
        return source
    run.note(
        f"WARNING: reward {source.name}: its stored standard deviation, {statistics.std:.1e} at a mean of "
        f"{statistics.mean:.3g}, is within rounding errors; scores are shifted by the mean and not scaled"
    )
    return source._replace(model=source.model._replace(statistics=statistics._replace(std=1.0)))


def _iterate(ppo: PPO, step: int, state: LoopState, observers: Observers) -> tuple[dict[str, float], LoopState]:
    """Make one iteration: generate, score, update, log samples, and adapt the KL coefficient and the reference."""
    settings, kl_coef = ppo.settings, state["kl_coef"]
    times = [time.perf_counter()]
    rollout = make_rollout(ppo, step)
    times.append(time.perf_counter())
    scored = score_rollout(ppo, rollout)
    experience = make_experience(
        scored.scores,
        scored.log_probs,
        scored.ref_log_probs,
        scored.values,
        rollout.completions.mask,
        groups=rollout.groups,
        estimator=ppo.estimator,
        kl_coef=kl_coef,
        kl_estimator="k1" if settings.kl_estimator == "exact" else settings.kl_estimator,
        kl_in_loss=settings.kl_in_loss,
        gamma=settings.gamma,
        lam=settings.lam,
        whiten_rewards=settings.whiten_rewards,
        whiten_advantages=bool(settings.whiten_advantages),
        bootstrap_value=scored.bootstrap_values,
    )
    times.append(time.perf_counter())
    update_metrics = _update(ppo, step, rollout, scored, experience, kl_coef)
    times.append(time.perf_counter())
    tokens = sum(map(len, rollout.prompts)) + int(rollout.completions.mask.sum())
    metrics = {name: float(value) for name, value in experience.metrics.items()} | update_metrics
    metrics |= {name: float(values.mean()) for name, values in scored.raw.items()} | scored.metrics
    if settings.samples_per_prompt > 1:
        metrics["objective/equal_groups"] = float(equal_groups(scored.scores, rollout.groups).float().mean())
    metrics |= {
        "objective/kl_coef": kl_coef,
        "response_length/ended": float(rollout.completions.ended.float().mean()),
        "timing_s/generate": times[1] - times[0],
        "timing_s/score": times[2] - times[1],
        "timing_s/update": times[3] - times[2],
        "perf/tokens_per_s": tokens / (times[3] - times[0]),
    }
    observers.samples(step + 1, sample_lines(ppo, rollout, scored, experience))
    if step < settings.critic_warmup:  # the policy has not moved: neither reference nor coefficient follows
        return metrics, state
    if settings.ref_ema is not None:
        ppo.executor.update_frozen("reference")
    if settings.kl_adaptive:
        kl, count = metrics["objective/kl"], len(rollout.texts)
        kl_coef = adaptive_kl_coef(kl_coef, kl, num_samples=count, target=settings.kl_target, horizon=settings.horizon)
    elif math.isfinite(settings.kl_budget):
        kl_coef = budget_kl_coef(kl_coef, metrics["objective/kl"], budget=settings.kl_budget, floor=settings.kl_coef)
    return metrics, {"kl_coef": kl_coef}


def _update(
    ppo: PPO, step: int, rollout: Rollout, scored: Scored, experience: Experience, kl_coef: float
) -> dict[str, float]:
    """Make several epochs of minibatch updates, and return the means of their metrics."""
    settings, warmup = ppo.settings, step < ppo.settings.critic_warmup
    if settings.critic_warmup and step == settings.critic_warmup:
        ppo.executor.reset_optimizer()  # its moments are of gradients that the policy did not have
    first_update = ppo.executor.version
    collected: defaultdict[str, list[float]] = defaultdict(list)
    lengths = rollout.completions.mask.sum(dim=1)

    def make_micro_batches(minibatch: list[int]) -> list[PPOBatch]:
        constant = settings.max_new_tokens if settings.loss_per == "constant" else None
        weights = torch.zeros(len(lengths))
        weights[minibatch] = loss_weights(lengths[minibatch], per=settings.loss_per, length=constant)
        return [
            ppo_batch(
                packed,
                old_log_probs=scored.log_probs,
                ref_log_probs=scored.ref_log_probs,
                old_values=scored.values,
                advantages=experience.advantages,
                returns=experience.returns,
                kl_coef=kl_coef,
                weights=weights,
            )
            for packed in pack_rollout(ppo, rollout, minibatch)
        ]

    prefetched = Prefetch(map(make_micro_batches, _minibatches(ppo, step, _learnt_from(ppo, rollout, scored))))
    for minibatch, micro_batches in enumerate(prefetched):
        version, rate = ppo.executor.version, learning_rate(settings, step, minibatch)
        metrics = ppo.executor.step("critic" if warmup else "ppo", micro_batches, rate, overlap=prefetched.prepare)
        for name, value in metrics.items():
            collected[name].append(value)
        if ppo.executor.version == version:  # above target_kl: the update was refused
            break
    updates = ppo.executor.version - first_update
    means = {name: sum(values) / len(values) for name, values in collected.items()}
    if "val/ratio" in means:  # which a loss of the user may leave out
        means["val/ratio_first"] = collected["val/ratio"][0]  # before any update: anything but 1 is a defect
    return means | {"lr": learning_rate(settings, step, 0), "policy/updates": updates}


def _learnt_from(ppo: PPO, rollout: Rollout, scored: Scored) -> list[int]:
    """Return the completions to learn from: all, or those of groups with different scores."""
    if not ppo.settings.drop_equal_groups:
        return list(range(len(rollout.texts)))
    return (~equal_groups(scored.scores, rollout.groups)).nonzero().flatten().tolist()


def _minibatches(ppo: PPO, step: int, rows: Sequence[int]) -> list[list[int]]:
    """Return the completions of each update: a permutation of `rows` for every epoch, cut into minibatches."""
    settings, minibatches = ppo.settings, []
    iteration_key = fold_in(ppo.run.key(Purpose.MINIBATCH), step)
    for epoch in range(settings.num_epochs if rows else 0):
        order = [rows[index] for index in permutation(fold_in(iteration_key, epoch), len(rows)).tolist()]
        minibatches += [
            order[first : first + settings.update_size] for first in range(0, len(rows), settings.update_size)
        ]
    return minibatches


def _save(ppo: PPO, config: PPORun, digests: Identity) -> Path:
    """Write OUTPUT_DIR/policy with its value function and a manifest that has the digest of the data."""
    folder = ppo.run.model_folder
    if ppo.run.is_saved:
        return folder
    params, critic = ppo.run.trained_params(ppo.executor), None
    start = start_facts(start_folder(config, config.ppo.model_path))
    if ppo.shapes.critic is not None:
        critic = RewardModel(params["critic"], ppo.shapes.critic, ppo.policy.tokenizer, RewardStatistics(0.0, 1.0, 0))
    save_language_model(
        folder,
        ppo.policy._replace(params=params["policy"]),
        facts=ppo.run.manifest(digests, iterations=config.ppo.num_iterations, **start._asdict()),
        value_head=params.get("value_head"),
        critic=critic,
    )
    return folder


PROGRAM = StageProgram(check_ppo, run_ppo, _needs)
