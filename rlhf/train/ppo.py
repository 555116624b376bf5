"""PPO with a KL penalty: prompts, an SFT model and a reward in, an aligned policy out.

One iteration: complete a batch of prompts, score the completions, turn scores and KL into advantages, and make
several epochs of minibatch updates. Follows Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), Stiennon et al.
2020 and the details of Huang et al. 2024 (https://arxiv.org/abs/2403.17031); metrics have TRL's names.
"""

import functools
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rlhf.batches import PPOBatch
from rlhf.config import PPORun
from rlhf.data.collate import Prefetch, ppo_batch
from rlhf.data.schema import PROMPTS
from rlhf.distributed.compute_context import compile_obstacle
from rlhf.errors import UserError
from rlhf.estimators import ESTIMATORS
from rlhf.experience import Experience, make_experience
from rlhf.io.files import check_folder
from rlhf.io.model_folder import RewardModel, RewardStatistics, load_language_model, save_language_model
from rlhf.io.reward_identity import identify_sources
from rlhf.io.reward_sources import (
    RewardSource,
    check_columns,
    check_vocabulary,
    names_folder,
    open_sources,
)
from rlhf.io.run_log import RunLog
from rlhf.kl import adaptive_kl_coef
from rlhf.random import Purpose, fold_in, permutation
from rlhf.statistics import spread
from rlhf.train.ppo_program import learning_rate, make_program, shapes_of, start_models
from rlhf.train.ppo_rollout import PPO, Rollout, Scored, make_rollout, pack_rollout, sample_lines, score_rollout
from rlhf.train.resume import Facts, digests_of
from rlhf.train.run import Run, StageResult, open_run, train
from rlhf.train.stage_inputs import ModelSpec, embedded_file, open_dataset, start_folder, start_model_spec

_CANCELLED = 1e-2
"""Size of what a score adds up at least, where the sum is close to 0."""


def run_ppo(config: PPORun) -> StageResult:
    """Align OUTPUT_DIR/sft to the reward and write OUTPUT_DIR/policy.

    Raises:
        UserError, NonFiniteError, Interrupted: see `rlhf.train.run`.
    """
    with open_run(config, "ppo") as run:
        ppo, identity = _open(run, config)
        last: dict[str, float] = {}

        def advance(step: int, facts: Facts, log: RunLog) -> tuple[dict[str, float], Facts]:
            metrics, facts = _iterate(ppo, step, facts, log)
            last.update(metrics)
            return metrics, facts

        train(
            run,
            ppo.executor,
            total=config.ppo.num_iterations,
            unit="iteration",
            shown=("objective/scores", "objective/kl", "response_length/mean"),
            facts={"kl_coef": config.ppo.kl_coef},
            identity=identity,
            advance=advance,
        )
        return StageResult(_save(ppo, config, identity["data"]), last)


class PPOInputs(NamedTuple):
    """What PPO starts from."""

    policy: ModelSpec
    sources: list[RewardSource]
    context: int
    """Tokens of a prompt and its completion together: the shortest context of the models that read them."""


def check(config: PPORun, sft: ModelSpec | None = None, reward: ModelSpec | None = None) -> PPOInputs:
    """Read what PPO starts from, but for the policy's parameters; refuse what cannot work together.

    Args:
        config: of the stage.
        sft: what OUTPUT_DIR/sft will hold, where it is trained first.
        reward: what OUTPUT_DIR/reward will hold, where it is trained first.

    Raises:
        UserError: a model or source is not there or not fit, or no prompt fits before the longest completion.
    """
    settings = config.ppo
    compile_obstacle(config, "ppo", settings)
    policy = start_model_spec(config, settings.model_path, "--ppo.model-path", sft)
    own = config.output_dir / "reward"
    if not settings.reward and reward is None:
        remedy = "name a reward: --ppo.reward FOLDER or --ppo.reward module:function"
        check_folder(own, f"run `rlhf-train reward` first, or {remedy}")
    sources = open_sources(_specs(config), policy.tokenizer, untrained=None if reward is None else own)
    if reward is not None and scores_with_own_model(config):
        check_vocabulary(own, reward.tokenizer, policy.tokenizer)
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
    if context <= settings.max_new_tokens:
        raise UserError(
            f"ppo.max_new_tokens is {settings.max_new_tokens}: no room for a prompt in a context of {context}; lower it"
        )
    return PPOInputs(policy, sources, context)


def scores_with_own_model(config: PPORun) -> bool:
    """Whether the model in OUTPUT_DIR/reward is among the sources of reward."""
    return any(names_folder(spec, config.output_dir / "reward") for spec in _specs(config))


def _specs(config: PPORun) -> tuple[str, ...]:
    """The sources of reward that are named, or OUTPUT_DIR/reward."""
    return config.ppo.reward or (str(config.output_dir / "reward"),)


def _open(run: Run, config: PPORun) -> tuple[PPO, Facts]:
    """Read models, reward sources and prompts."""
    model_spec, sources, context = check(config)
    sources = [_with_spread(run, source) for source in sources] if config.ppo.normalize_reward else sources
    settings, specs, folder = config.ppo, _specs(config), start_folder(config, config.ppo.model_path)
    policy = load_language_model(folder)
    reward_notes = [line for source in sources if source.model is not None for line in source.model.notes]
    for line in dict.fromkeys((*policy.notes, *reward_notes)):
        run.note(line)
    path = config.prompt_data or embedded_file(run, "prompts")
    prompts = open_dataset(run, path, PROMPTS, policy.tokenizer, context - settings.max_new_tokens)
    check_columns(sources, prompts.keys)
    run.note(f"{len(prompts)} prompts; policy and reference from {folder}; reward: {' + '.join(specs)}")
    shapes = shapes_of(settings, policy, sources)
    models = start_models(settings, policy, sources)
    completions = settings.num_iterations * settings.batch_size * settings.samples_per_prompt
    tokens = settings.num_epochs * completions * (prompts.mean_tokens(context) + settings.max_new_tokens)
    optimised = [source.model.params for source in sources if source.model is not None and source.weight]
    compile_to = run.compile_to(models, tokens, evaluated=[models.params, models.frozen["reference"], *optimised])
    executor = run.open_executor(functools.partial(make_program, shapes, settings, run.dtype, compile_to), models)
    ppo = PPO(run, settings, policy, shapes, prompts, sources, executor, context)
    digests = digests_of(path, policy.tokenizer)
    return ppo, digests | {"model": model_spec.digest, "sources": identify_sources(specs)}


def _with_spread(run: Run, source: RewardSource) -> RewardSource:
    """A source whose reward model's standard deviation, if it is no more than rounding, is 1; the user is told."""
    if source.model is None:
        return source
    statistics = source.model.statistics
    size = max(abs(statistics.mean), _CANCELLED)
    if spread(statistics.std, size):
        return source
    run.note(
        f"WARNING: reward {source.name}: its stored standard deviation, {statistics.std:.1e} at a mean of "
        f"{statistics.mean:.3g}, is no more than rounding; scores are shifted by the mean and not scaled"
    )
    return source._replace(model=source.model._replace(statistics=statistics._replace(std=1.0)))


def _iterate(ppo: PPO, step: int, facts: Facts, log: RunLog) -> tuple[dict[str, float], Facts]:
    """One iteration: generate, score, learn, log samples, then move the KL coefficient and the reference."""
    settings, kl_coef = ppo.settings, facts["kl_coef"]
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
        estimator=ESTIMATORS[settings.estimator],
        kl_coef=kl_coef,
        kl_estimator="k1" if settings.kl_estimator == "exact" else settings.kl_estimator,
        kl_in_loss=settings.kl_in_loss,
        gamma=settings.gamma,
        lam=settings.lam,
        whiten_rewards=settings.whiten_rewards,
        whiten_advantages=settings.whiten_advantages,
        bootstrap_value=scored.bootstrap_values,
    )
    times.append(time.perf_counter())
    update = _learn(ppo, step, rollout, scored, experience, kl_coef)
    times.append(time.perf_counter())
    tokens = sum(map(len, rollout.prompts)) + int(rollout.completions.mask.sum())
    metrics = {name: float(value) for name, value in experience.metrics.items()} | update
    metrics |= {name: float(values.mean()) for name, values in scored.raw.items()}
    metrics |= {
        "objective/kl_coef": kl_coef,
        "response_length/ended": float(rollout.completions.ended.float().mean()),
        "timing_s/generate": times[1] - times[0],
        "timing_s/score": times[2] - times[1],
        "timing_s/update": times[3] - times[2],
        "perf/tokens_per_s": tokens / (times[3] - times[0]),
    }
    log.samples(step + 1, sample_lines(ppo, rollout, scored, experience))
    if step < settings.critic_warmup:  # the policy has not moved: neither reference nor coefficient follows
        return metrics, facts
    if settings.ref_ema is not None:
        ppo.executor.update_frozen("reference")
    if settings.kl_adaptive:
        kl, count = metrics["objective/kl"], len(rollout.texts)
        kl_coef = adaptive_kl_coef(
            kl_coef, kl, num_samples=count, target=settings.kl_target, horizon=settings.kl_horizon
        )
    return metrics, {"kl_coef": kl_coef}


def _learn(
    ppo: PPO, step: int, rollout: Rollout, scored: Scored, experience: Experience, kl_coef: float
) -> dict[str, float]:
    """Several epochs of minibatch updates; means of their metrics."""
    settings, warmup = ppo.settings, step < ppo.settings.critic_warmup
    if settings.critic_warmup and step == settings.critic_warmup:
        ppo.executor.reset_optimizer()  # the policy's first updates shall not see averages of gradients it never had
    first_update = ppo.executor.version
    collected: defaultdict[str, list[float]] = defaultdict(list)

    def micro_batches_of(minibatch: list[int]) -> list[PPOBatch]:
        return [
            ppo_batch(
                packed,
                old_log_probs=scored.log_probs,
                ref_log_probs=scored.ref_log_probs,
                old_values=scored.values,
                advantages=experience.advantages,
                returns=experience.returns,
                kl_coef=kl_coef,
            )
            for packed in pack_rollout(ppo, rollout, minibatch)
        ]

    prefetched = Prefetch(map(micro_batches_of, _minibatches(ppo, step, len(rollout.texts))))
    for minibatch, micro_batches in enumerate(prefetched):
        version, rate = ppo.executor.version, learning_rate(settings, step, minibatch)
        metrics = ppo.executor.step("critic" if warmup else "ppo", micro_batches, rate, overlap=prefetched.prepare)
        for name, value in metrics.items():
            collected[name].append(value)
        if ppo.executor.version == version:  # beyond target_kl
            break
    updates = ppo.executor.version - first_update
    means = {name: sum(values) / len(values) for name, values in collected.items()}
    means["val/ratio_first"] = collected["val/ratio"][0]  # before any update: anything but 1 is a defect
    return means | {"lr": learning_rate(settings, step, 0), "policy/updates": updates}


def _minibatches(ppo: PPO, step: int, count: int) -> list[list[int]]:
    """The completions of each update of an iteration: for each epoch a permutation, cut into minibatches."""
    settings, minibatches = ppo.settings, []
    iteration_key = fold_in(ppo.run.key(Purpose.MINIBATCH), step)
    for epoch in range(settings.num_epochs):
        order = permutation(fold_in(iteration_key, epoch), count).tolist()
        minibatches += [
            order[first : first + settings.minibatch_size] for first in range(0, count, settings.minibatch_size)
        ]
    return minibatches


def _save(ppo: PPO, config: PPORun, data: str) -> Path:
    """Write OUTPUT_DIR/policy, with the value function beside it; its manifest has the digest of the `data`."""
    folder = ppo.run.model_folder
    if ppo.run.is_saved:
        return folder
    params, critic = ppo.run.trained(ppo.executor), None
    if ppo.shapes.critic is not None:
        critic = RewardModel(params["critic"], ppo.shapes.critic, ppo.policy.tokenizer, RewardStatistics(0.0, 1.0, 0))
    save_language_model(
        folder,
        ppo.policy._replace(params=params["policy"]),
        facts={"stage": "ppo", "seed": config.seed, "iterations": config.ppo.num_iterations, "data": data},
        value_head=params.get("value_head"),
        critic=critic,
    )
    return folder
