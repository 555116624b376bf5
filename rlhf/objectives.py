"""From parameters and a micro-batch to what a stage optimises or measures: GPT-2, heads and losses put together.

Every `make_*` closes over numbers and returns a pure function of (params, frozen, batch): `params` are trained, in
float32; `frozen` holds constant models by name. The models run in `dtype`; log-probs, values and losses are float32.

Layouts: SFT trains a GPT-2 itself; a reward model and a separate critic are `{"trunk": GPT-2, "head": head}`;
PPO trains `{"policy": GPT-2, "critic": {...}}`, or `{"policy": GPT-2, "value_head": head}` on a shared trunk.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.batches import PairBatch, PPOBatch, PromptBatch, Rows, ScoreBatch, TokenBatch
from rlhf.decoding import decoding_copy
from rlhf.gpt2 import compute_copy, trunk, unembed
from rlhf.gpt2_config import GPT2Config
from rlhf.heads import apply_head
from rlhf.kl import exact_kl, kl_estimate
from rlhf.losses import ppo_policy_loss, ppo_value_loss, reward_loss, sft_loss
from rlhf.ops import entropy, gather_rows, is_likeliest, masked_sum, token_log_probs
from rlhf.remat import chunk_size, in_chunks
from rlhf.sampling import Completions, draw_tokens, generate
from rlhf.tree import tree_map
from rlhf.types import Metrics, Params

Frozen = dict[str, Params]

Objective = Callable[[Params, Frozen, Any], tuple[Tensor, Metrics]]
"""(params, frozen, micro-batch) -> (loss sum, metric sums with `count`)."""


@dataclass(frozen=True)
class SumOfLosses:
    """A sum of objectives, each with a forward pass of its own, which may share parameters.

    Where memory counts, each is differentiated by itself, and the gradients are added up.
    """

    parts: tuple[Objective, ...]

    def __call__(self, params: Params, frozen: Frozen, batch: Any) -> tuple[Tensor, Metrics]:
        """All parts together, as any objective."""
        return add_results([part(params, frozen, batch) for part in self.parts])


def add_results(results: Sequence[tuple[Tensor, Metrics]]) -> tuple[Tensor, Metrics]:
    """The sum of losses, and all metrics; those that several have, such as `count`, are the same in each."""
    losses, metrics = zip(*results, strict=True)
    return functools.reduce(torch.add, losses), {name: of for some in metrics for name, of in some.items()}


def make_sft_objective(
    config: GPT2Config,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
) -> Callable[[Params, Frozen, TokenBatch], tuple[Tensor, Metrics]]:
    """(GPT-2, frozen, TokenBatch) -> `sft_loss` of the tokens that count, with `sft/accuracy` beside it."""

    def per_token(params: Params, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = unembed(params, hidden, aligned=True)
        return token_log_probs(logits, targets), is_likeliest(logits.detach(), targets).float()

    def objective(params: Params, frozen: Frozen, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        params = compute_copy(params, dtype)
        hidden = _hidden(
            params, batch.rows, config, dropout=dropout, key=batch.key, gradient_checkpointing=gradient_checkpointing
        )
        log_probs, correct = in_chunks(per_token, chunk_size(config.vocab_size))(
            _tied(params), gather_rows(hidden, batch.predictors), batch.targets
        )
        loss, metrics = sft_loss(log_probs, batch.mask)
        return loss, metrics | {"sft/accuracy": masked_sum(correct, batch.mask)}

    return objective


def make_reward_objective(
    config: GPT2Config,
    *,
    dtype: torch.dtype = torch.float32,
    centre_coef: float = 0.0,
    gradient_checkpointing: bool = False,
) -> Callable[[Params, Frozen, PairBatch], tuple[Tensor, Metrics]]:
    """(reward model, frozen, PairBatch) -> `reward_loss` of the pairs."""

    def objective(params: Params, frozen: Frozen, batch: PairBatch) -> tuple[Tensor, Metrics]:
        trunk_params = compute_copy(params["trunk"], dtype)
        hidden = _hidden(trunk_params, batch.rows, config, gradient_checkpointing=gradient_checkpointing)
        chosen, rejected = (
            apply_head(params["head"], gather_rows(hidden, last)) for last in (batch.chosen, batch.rejected)
        )
        return reward_loss(chosen, rejected, batch.mask, margin=batch.margin, centre_coef=centre_coef)

    return objective


def make_pair_scores(
    config: GPT2Config, *, dtype: torch.dtype = torch.float32
) -> Callable[[Params, Frozen, PairBatch], tuple[Tensor, Tensor]]:
    """(reward model, frozen, PairBatch) -> scores [B] of the chosen and of the rejected, reward units."""

    def scores(params: Params, frozen: Frozen, batch: PairBatch) -> tuple[Tensor, Tensor]:
        hidden = _hidden(compute_copy(params["trunk"], dtype), batch.rows, config)
        return apply_head(params["head"], gather_rows(hidden, batch.chosen)), apply_head(
            params["head"], gather_rows(hidden, batch.rejected)
        )

    return scores


def make_ppo_objective(
    config: GPT2Config,
    critic_config: GPT2Config | None,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    clip_eps: float = 0.2,
    dual_clip: float | None = None,
    value_clip_eps: float = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    loss_kl: Literal["none", "k1", "k2", "k3", "exact"] = "none",
    policy_coef: float = 1.0,
    gradient_checkpointing: bool = False,
) -> Objective:
    """(params, frozen, PPOBatch) -> policy loss + value_coef * value loss - entropy_coef * entropy [+ kl_coef * KL].

    Source: Schulman et al. 2017, eq. 9, https://arxiv.org/abs/1707.06347; the KL in the loss is that of Shao et al.
    2024 (GRPO), eq. 4, https://arxiv.org/abs/2402.03300.

    Args:
        config: shape of the policy.
        critic_config: shape of a separate critic; None for a value head on the policy's trunk.
        dtype: of the models' forward and backward pass.
        temperature: as when sampling.
        clip_eps: of `rlhf.losses.ppo_policy_loss`.
        dual_clip: of the same.
        value_clip_eps: of `rlhf.losses.ppo_value_loss`.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        loss_kl: KL to the reference in the loss, weighted by the batch's kl_coef; "exact" reads frozen["reference"].
        policy_coef: 0 leaves the value loss alone (critic warm-up).
        gradient_checkpointing: of `rlhf.gpt2.trunk`, in policy and critic.
    """

    def per_token(models: Frozen, hidden: Tensor, targets: Tensor, *ref_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = unembed(models["policy"], hidden, aligned=True)
        log_probs = token_log_probs(logits, targets, temperature=temperature)
        entropies = entropy(logits if entropy_coef else logits.detach(), temperature=temperature)
        ref_logits = [unembed(models["reference"], of_reference, aligned=True) for of_reference in ref_hidden]
        return log_probs, entropies, *(exact_kl(logits, of, temperature=temperature) for of in ref_logits)

    def of_policy(params: Params, frozen: Frozen, batch: PPOBatch) -> tuple[Tensor, Metrics, Tensor]:
        policy = compute_copy(params["policy"], dtype)
        hidden = at_predictors(policy, batch, config, gradient_checkpointing=gradient_checkpointing)
        models, columns = {"policy": _tied(policy)}, [hidden, batch.targets]
        if loss_kl == "exact":
            reference = compute_copy(frozen["reference"], dtype)
            models["reference"] = _tied(reference)
            columns.append(at_predictors(reference, batch, config))
        log_probs, entropies, *exact = in_chunks(per_token, chunk_size(config.vocab_size))(models, *columns)
        policy_loss, metrics = ppo_policy_loss(
            log_probs, batch.old_log_probs, batch.advantages, batch.mask, clip_eps=clip_eps, dual_clip=dual_clip
        )
        token_entropy = masked_sum(entropies, batch.mask)
        policy_total = policy_loss - entropy_coef * token_entropy
        metrics["policy/entropy_avg"] = token_entropy.detach()
        if loss_kl != "none":
            if loss_kl == "exact":
                (of_tokens,) = exact
            else:
                of_tokens = kl_estimate(log_probs, batch.ref_log_probs, estimator=loss_kl)
            kl = masked_sum(of_tokens, batch.mask)
            policy_total = policy_total + batch.kl_coef * kl
            metrics["loss/kl_avg"] = kl.detach()
        return policy_coef * policy_total, metrics, hidden

    def of_values(values: Tensor, batch: PPOBatch) -> tuple[Tensor, Metrics]:
        loss, metrics = ppo_value_loss(
            values, batch.old_values, batch.returns, batch.mask, value_clip_eps=value_clip_eps
        )
        return value_coef * loss, metrics

    def both(params: Params, frozen: Frozen, batch: PPOBatch) -> tuple[Tensor, Metrics]:
        loss, metrics, hidden = of_policy(params, frozen, batch)
        return add_results([(loss, metrics), of_values(apply_head(params["value_head"], hidden), batch)])

    def policy(params: Params, frozen: Frozen, batch: PPOBatch) -> tuple[Tensor, Metrics]:
        params = params if policy_coef else tree_map(Tensor.detach, params)
        return of_policy(params, frozen, batch)[:2]

    def critic(params: Params, frozen: Frozen, batch: PPOBatch) -> tuple[Tensor, Metrics]:
        assert critic_config is not None
        values = _critic(params, batch, critic_config, dtype, gradient_checkpointing=gradient_checkpointing)
        return of_values(values, batch)

    if critic_config is None:
        return both
    return SumOfLosses((policy, critic))


def make_rollout(
    config: GPT2Config,
    *,
    dtype: torch.dtype = torch.float32,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    slots: int | None = None,
    draw: Callable[..., Any] = draw_tokens,
) -> Callable[[Params, Frozen, PromptBatch], Completions]:
    """(params, frozen, PromptBatch) -> completions of the policy, with values where the head is on its trunk.

    Args:
        config: shape of the policy.
        dtype: of its passes.
        max_new_tokens: of `rlhf.sampling.generate`, as all that follow but the last.
        min_new_tokens: same.
        temperature: same.
        top_k: same.
        top_p: same.
        stop_tokens: same.
        slots: same.
        draw: same, or a compiled form (`rlhf.execution.draws`). Each call on a CPU then goes through 16 layers or more
            (32 with one row), beside which the way into compiled code costs little.
    """
    per_call = 1 if draw is draw_tokens else max(1, (32 if slots == 1 else 16) // config.n_layer)

    def rollout(params: Params, frozen: Frozen, batch: PromptBatch) -> Completions:
        return generate(
            decoding_copy(params["policy"], dtype),
            batch.prompts,
            batch.lengths,
            batch.keys,
            config=config,
            source=batch.source,
            slots=slots,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stop_tokens,
            value_head=params.get("value_head"),
            draw=draw,
            draws_per_call=per_call if batch.prompts.is_cpu else None,
        )

    return rollout


class Scores(NamedTuple):
    """What a frozen look at finished completions gives; [C] tensors are zeros where they were not asked for."""

    ref_log_probs: Tensor
    """[C] float32, nats, reference."""
    log_probs: Tensor
    """[C] float32, nats, policy, in one full forward pass."""
    values: Tensor
    """[C] float32, reward units: a separate critic, or the value head where log-probs were recomputed."""
    scores: Tensor
    """[B, K] float32, reward units: each of the K reward models on the last token."""
    bootstrap_values: Tensor
    """[B] float32, reward units: the value function in the state after the last token."""


def make_scorer(
    config: GPT2Config,
    critic_config: GPT2Config | None,
    reward_configs: Sequence[GPT2Config],
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    log_probs: bool = False,
    bootstrap: bool = False,
) -> Callable[[Params, Frozen, ScoreBatch], Scores]:
    """(params, frozen, ScoreBatch) -> `Scores`: reference log-probs, separate critic's values, reward model's scores.

    Args:
        config: shape of policy and reference (frozen["reference"]).
        critic_config: shape of params["critic"]; None where there is none.
        reward_configs: shapes of frozen["reward_model_0"], frozen["reward_model_1"], …
        dtype: of the models' forward pass.
        temperature: as when sampling.
        log_probs: recompute the policy's log-probs (and the values of a head on its trunk).
        bootstrap: compute the values of the states after the last tokens.
    """

    def per_token(params: Params, hidden: Tensor, targets: Tensor) -> tuple[Tensor]:
        logits = unembed(params, hidden, aligned=True)
        return (token_log_probs(logits, targets, temperature=temperature),)

    def look(params: Params, batch: ScoreBatch) -> tuple[Tensor, Tensor]:
        """Hidden states [R * T, D] and log-probs [C] of a GPT-2."""
        params = compute_copy(params, dtype)
        hidden = _hidden(params, batch.rows, config)
        predictors = gather_rows(hidden, batch.predictors)
        return hidden, in_chunks(per_token, chunk_size(config.vocab_size))(_tied(params), predictors, batch.targets)[0]

    def score(params: Params, frozen: Frozen, batch: ScoreBatch) -> Scores:
        _, ref_log_probs = look(frozen["reference"], batch)
        policy_log_probs = values = torch.zeros_like(ref_log_probs)
        bootstrap_values = torch.zeros(len(batch.last), device=batch.last.device)
        head, hidden = params.get("value_head"), None
        if log_probs or (bootstrap and head is not None):
            hidden, policy_log_probs = look(params["policy"], batch)
        if critic_config is not None:
            head = params["critic"]["head"]
            hidden = _hidden(compute_copy(params["critic"]["trunk"], dtype), batch.rows, critic_config)
        if head is not None and hidden is not None:
            values = apply_head(head, gather_rows(hidden, batch.predictors))
            if bootstrap:
                bootstrap_values = apply_head(head, gather_rows(hidden, batch.last))
        scores = reward_scores(frozen, batch, reward_configs, dtype)
        return Scores(ref_log_probs, policy_log_probs, values, scores, bootstrap_values)

    return score


def reward_scores(frozen: Frozen, batch: ScoreBatch, configs: Sequence[GPT2Config], dtype: torch.dtype) -> Tensor:
    """[B, K] float32, reward units: what frozen["reward_model_0"], … give the last token of each sequence.

    Args:
        frozen: holds the K reward models.
        batch: finished texts.
        configs: their shapes.
        dtype: of their forward pass.
    """
    scores = [torch.zeros(len(batch.last), 0, device=batch.last.device)]
    for number, config in enumerate(configs):
        model = frozen[f"reward_model_{number}"]
        hidden = _hidden(compute_copy(model["trunk"], dtype), batch.rows, config)
        scores.append(apply_head(model["head"], gather_rows(hidden, batch.last)).unsqueeze(1))
    return torch.cat(scores, dim=1)


def at_predictors(params: Params, batch: ScoreBatch | PPOBatch, config: GPT2Config, **options: Any) -> Tensor:
    """[C, D] hidden states that predict the completion tokens; no other logits are ever computed.

    Args:
        params: GPT-2 parameters.
        batch: finished texts.
        config: the shape of `params`.
        **options: of `rlhf.gpt2.trunk`.
    """
    return gather_rows(_hidden(params, batch.rows, config, **options), batch.predictors)


def _hidden(params: Params, rows: Rows, config: GPT2Config, **options: Any) -> Tensor:
    """[R * T, D] hidden states of packed rows; options as `rlhf.gpt2.trunk`'s."""
    return trunk(
        params,
        rows.tokens,
        config=config,
        positions=rows.positions,
        segments=rows.segments,
        bounds=rows.bounds,
        **options,
    ).flatten(0, 1)


def _tied(params: Params) -> Params:
    """What `unembed` reads."""
    return {"wte": params["wte"]}


def _critic(params: Params, batch: PPOBatch, config: GPT2Config, dtype: torch.dtype, **options: Any) -> Tensor:
    hidden = at_predictors(compute_copy(params["critic"]["trunk"], dtype), batch, config, **options)
    return apply_head(params["critic"]["head"], hidden)
