"""The rollout of a PPO iteration: completions of prompts, and their scores."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data.collate import (
    JoinedCompletions,
    PackedCompletions,
    join_completions,
    pack_completions,
    unpack_sequences,
    unpack_tokens,
)
from rlhf.data.conversations import as_completion, as_text
from rlhf.data.dataset import Dataset
from rlhf.data.packing import choose_row_length
from rlhf.errors import NonFiniteError
from rlhf.estimators import Estimator
from rlhf.execution.executor import Executor
from rlhf.experience import Experience, postprocess_scores
from rlhf.generate.complete import complete, decode_completions
from rlhf.io.model_folder import LanguageModel
from rlhf.io.reward_sources import RewardSource
from rlhf.models.decoding import Completions
from rlhf.random import Purpose, fold_in
from rlhf.train.context import Run
from rlhf.train.ppo_program import ModelShapes, recomputes_log_probs
from rlhf.train.ppo_rewards import score_sources
from rlhf.train.stage_inputs import record_order


class PPO(NamedTuple):
    """Arguments that all iterations share."""

    run: Run
    settings: PPOConfig
    estimator: Estimator
    policy: LanguageModel
    shapes: ModelShapes
    prompts: Dataset
    sources: list[RewardSource]
    executor: Executor
    context: int
    """Shortest context of the models, in tokens."""


class Rollout(NamedTuple):
    """Completions of an iteration, in the order of its prompts."""

    columns: list[dict[str, Any]]
    """Record of the prompt file for each completion."""
    prompts: list[np.ndarray]
    """Token ids of each prompt."""
    groups: Tensor
    """[B] int64: index of the prompt that a completion belongs to."""
    completions: Completions
    joined: JoinedCompletions
    """Prompts joined with their completions, from which micro-batches are packed."""
    texts: list[str]
    version: int
    """Version of the policy that sampled the completions."""


class Scored(NamedTuple):
    """Log-probs, values and scores of the completions of an iteration, before the update."""

    log_probs: Tensor
    """[B, T] nats: log-probs under the policy."""
    ref_log_probs: Tensor
    """[B, T] nats: log-probs under the reference."""
    values: Tensor | None
    """[B, T] reward units: values of the critic. None without a critic."""
    scores: Tensor
    """[B] reward units: scores after `postprocess_scores`, on which the policy is trained."""
    raw: dict[str, Tensor]
    """[B] scores as the sources return them, by the metric of the source, and the disagreement of an ensemble."""
    bootstrap_values: Tensor
    """[B] reward units: value after the last token. 0 if the completion ended, or without ppo.bootstrap_truncated."""
    metrics: dict[str, float]
    """Metrics of an ensemble by a gold score."""


def make_rollout(ppo: PPO, step: int) -> Rollout:
    """Complete the prompts of an iteration. A completion depends only on seed, iteration, index, sample and policy."""
    settings = ppo.settings
    order = record_order(ppo.run.key(Purpose.ORDER), len(ppo.prompts), step * settings.batch_size, settings.batch_size)
    records = [record for record in order for _ in range(settings.samples_per_prompt)]
    prompts = [ppo.prompts.prompt(record, ppo.context - settings.completion_tokens) for record in records]
    groups = torch.arange(len(order)).repeat_interleave(settings.samples_per_prompt)
    samples = torch.arange(settings.samples_per_prompt).repeat(len(order))
    keys = fold_in(fold_in(fold_in(ppo.run.key(Purpose.SAMPLING), step).expand(len(records), 2), groups), samples)
    version = ppo.executor.version
    completions = complete(ppo.executor, prompts, keys, rows=settings.rollout_batch_size)
    return Rollout(
        columns=[ppo.prompts.columns(record) for record in records],
        prompts=prompts,
        groups=groups,
        completions=completions,
        joined=join_completions(prompts, completions.tokens, completions.mask.sum(dim=1)),
        texts=decode_completions(ppo.policy.tokenizer, completions),
        version=version,
    )


def pack_rollout(ppo: PPO, rollout: Rollout, indices: Sequence[int]) -> list[PackedCompletions]:
    """Return micro-batches of the completions with the given indices."""
    needed = max(map(len, rollout.prompts)) + ppo.settings.completion_tokens
    return pack_completions(
        rollout.joined,
        indices,
        rows=ppo.settings.micro_batch_size,
        row_length=choose_row_length(needed, ppo.context),
    )


def score_rollout(ppo: PPO, rollout: Rollout) -> Scored:
    """Return log-probs, values and scores of all completions.

    Raises:
        NonFiniteError: a log-prob, value or score is not finite.
        UserError: a reward function fails.
    """
    settings, completions = ppo.settings, rollout.completions
    packs = pack_rollout(ppo, rollout, range(len(rollout.texts)))
    results = ppo.executor.map("score", [pack.batch for pack in packs])
    shape = completions.mask.shape
    ref_log_probs = unpack_tokens(packs, [result.ref_log_probs for result in results], shape)
    prompts = [columns["prompt"] for columns in rollout.columns]
    model_scores = unpack_sequences(packs, [result.scores for result in results])
    texts = list(map(as_completion, prompts, rollout.texts))
    raw, total, metrics = score_sources(settings, ppo.sources, model_scores, prompts, texts, rollout.columns)
    recomputed = recomputes_log_probs(settings, ppo.run.dtype)
    log_probs, values = completions.log_probs, completions.values if settings.critic == "shared" else None
    if recomputed:
        log_probs = unpack_tokens(packs, [result.log_probs for result in results], shape)
    if settings.critic == "separate" or (settings.critic == "shared" and recomputed):
        values = unpack_tokens(packs, [result.values for result in results], shape)
    bootstrap_values = unpack_sequences(packs, [result.bootstrap_values for result in results])
    for name, array in {
        "log-prob": log_probs,
        "reference log-prob": ref_log_probs,
        "value": values,
        "value after the last token": bootstrap_values,
        **{f"score ({metric})": scores for metric, scores in raw.items()},
        "reward": total,
    }.items():
        if array is not None and not torch.isfinite(array).all():
            row = int((~torch.isfinite(array)).nonzero()[0, 0])
            raise NonFiniteError(f"a {name} is not finite for the completion {rollout.texts[row]!r}", completions)
    finished = completions.ended | torch.tensor(not settings.stop_at_eos)
    scores = postprocess_scores(
        total, finished, missing_eos_penalty=settings.missing_eos_penalty or 0.0, clip=settings.reward_clip
    )
    bootstrap_values = torch.where(finished, 0.0, bootstrap_values)
    return Scored(log_probs, ref_log_probs, values, scores, raw, bootstrap_values, metrics)


def sample_lines(ppo: PPO, rollout: Rollout, scored: Scored, experience: Experience) -> list[dict[str, Any]]:
    """Return lines of samples.jsonl for the first `log.samples` completions.

    The first `log.token_samples` lines have `per_token`: pieces of the text, with log-probs, values and advantages.
    """
    settings, lengths, kl = ppo.run.config.log, rollout.completions.mask.sum(dim=1), experience.kl.sum(dim=1)
    lines = [
        {
            "prompt": as_text(columns["prompt"]),
            "completion": text,
            "score": float(scored.scores[row]),
            "kl": float(kl[row]),
            "tokens": int(lengths[row]),
            "ended": bool(rollout.completions.ended[row]),
            "policy_version": rollout.version,
        }
        | {name: float(values[row]) for name, values in scored.raw.items()}
        for row, (columns, text) in enumerate(zip(rollout.columns, rollout.texts, strict=True))
        if row < settings.samples
    ]
    arrays = {
        "log_probs": scored.log_probs,
        "ref_log_probs": scored.ref_log_probs,
        "values": scored.values,
        "advantages": experience.advantages,
    }
    for row, line in enumerate(lines[: settings.token_samples]):
        length = line["tokens"]
        pieces = ppo.policy.tokenizer.pieces(rollout.completions.tokens[row, :length].tolist())
        # last in its line, so that a reader can skip it without parsing
        line["per_token"] = {"pieces": pieces} | {
            name: _rounded(rows[row, :length]) for name, rows in arrays.items() if rows is not None
        }
    return lines


def _rounded(values: Tensor) -> list[float]:
    """Return the values rounded to four decimals, which take a third of the space."""
    return [round(value, 4) for value in values.tolist()]
