"""The PPO objective: clipped policy loss, value loss, entropy bonus, and optionally the KL to the reference."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.batches import PPOBatch
from rlhf.execution.program import Objective, SumOfLosses, add_results
from rlhf.kl import exact_kl, importance_weighted_kl, kl_estimate
from rlhf.losses import ppo_value_loss, weighted_sum
from rlhf.models.architecture import ModelShape, architecture_of
from rlhf.models.forward import at_predictors, trunk_states
from rlhf.models.heads import apply_head
from rlhf.ops import entropy, gather_rows, masked_sum, token_log_probs
from rlhf.policy_losses import POLICY_LOSSES, PolicyLoss
from rlhf.remat import chunk_size, in_chunks
from rlhf.tree import tree_map
from rlhf.types import FrozenParams, MetricSums, Params


def make_ppo_objective(
    config: ModelShape,
    critic_config: ModelShape | None,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    policy_loss: PolicyLoss = POLICY_LOSSES["ppo"],
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_eps: float = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    loss_kl: Literal["none", "k1", "k2", "k3", "exact"] = "none",
    weight_kl: bool = False,
    policy_coef: float = 1.0,
    gradient_checkpointing: bool = False,
) -> Objective:
    """Return the PPO objective, a function (params, frozen, PPOBatch) -> (loss sum, metric sums).

    The loss is policy loss + value_coef * value loss - entropy_coef * entropy, plus kl_coef * KL if loss_kl is set. The
    weights of the batch apply to the terms of the policy.

    Source: Schulman et al. 2017, eq. 9, https://arxiv.org/abs/1707.06347; the KL in the loss is that of Shao et al.
    2024 (GRPO), eq. 4, https://arxiv.org/abs/2402.03300.

    Args:
        config: shape of the policy.
        critic_config: shape of a separate critic. None for params["value_head"] on the policy's trunk, or no critic.
        dtype: dtype of the models' forward and backward passes.
        temperature: softmax temperature of sampling.
        policy_loss: policy loss of `rlhf.policy_losses`, or a function with the same signature.
        clip_eps: half-width of the interval of ratios, as in `rlhf.losses.ppo_policy_loss`.
        clip_eps_high: width of the upper half of the interval. None stands for clip_eps.
        dual_clip: bound of the loss where the advantage is negative, as in `rlhf.losses.ppo_policy_loss`.
        value_clip_eps: maximum change of the values, as in `rlhf.losses.ppo_value_loss`.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        loss_kl: KL estimator in the loss, weighted by the batch's kl_coef; "exact" reads frozen["reference"].
        weight_kl: multiply the KL by the probability ratio (`rlhf.kl.importance_weighted_kl`).
        policy_coef: factor on the terms of the policy. 0 trains only the value function (critic warm-up).
        gradient_checkpointing: recompute activations of policy and critic in the backward pass.
    """
    forward = _make_policy_forward(
        config, dtype, temperature, bool(entropy_coef), loss_kl == "exact", gradient_checkpointing
    )
    dual = {} if dual_clip is None else {"dual_clip": dual_clip}

    def terms_of_policy(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums, Tensor]:
        outputs = forward(params["policy"], frozen, batch)
        loss, metrics = policy_loss(
            outputs.log_probs,
            old_log_probs=batch.old_log_probs,
            advantages=batch.advantages,
            mask=batch.mask,
            weights=batch.weights,
            clip_eps=clip_eps,
            clip_eps_high=clip_eps_high,
            sequences=batch.sequences,
            **dual,
        )
        loss = loss - entropy_coef * _weighted(outputs.entropies, batch)
        metrics["policy/entropy_avg_sum"] = masked_sum(outputs.entropies, batch.mask).detach()
        if loss_kl != "none":
            kl = _weighted(_token_kl(outputs, batch, loss_kl, weight_kl), batch)
            loss = loss + batch.kl_coef * kl
            metrics["loss/kl_avg_sum"] = kl.detach()
        return policy_coef * loss, metrics, outputs.hidden

    def value_loss(values: Tensor, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        targets = {"old_values": batch.old_values, "returns": batch.returns, "mask": batch.mask}
        loss, metrics = ppo_value_loss(values, **targets, value_clip_eps=value_clip_eps)
        return value_coef * loss, metrics

    def both(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        loss, metrics, hidden = terms_of_policy(params, frozen, batch)
        if "value_head" not in params:
            return loss, metrics
        return add_results([(loss, metrics), value_loss(apply_head(params["value_head"], hidden), batch)])

    def policy(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        params = params if policy_coef else tree_map(Tensor.detach, params)
        return terms_of_policy(params, frozen, batch)[:2]

    def critic(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        assert critic_config is not None
        values = _critic_values(params, batch, critic_config, dtype, gradient_checkpointing=gradient_checkpointing)
        return value_loss(values, batch)

    return both if critic_config is None else SumOfLosses((policy, critic))


class _PolicyOutputs(NamedTuple):
    """Outputs of the forward pass of the policy at each completion token."""

    log_probs: Tensor
    """[C] float32, nats: log-probs of the tokens."""
    entropies: Tensor
    """[C] float32, nats: entropies of the distributions."""
    exact_kl: Tensor | None
    """[C] float32, nats: KL(policy || reference) over the vocabulary. None unless it is requested."""
    hidden: Tensor
    """[C, D]: hidden states that predict the tokens."""


def _weighted(per_token: Tensor, batch: PPOBatch) -> Tensor:
    """Return the sum over the tokens that count, with the batch's weights."""
    return weighted_sum("PPO objective", torch.where(batch.mask, per_token, 0.0), batch.mask, batch.weights)


def _token_kl(
    outputs: _PolicyOutputs, batch: PPOBatch, name: Literal["k1", "k2", "k3", "exact"], weigh: bool
) -> Tensor:
    """Return [C] nats, the KL to the reference of each token, as `make_ppo_objective` was asked for."""
    if name == "exact":
        assert outputs.exact_kl is not None, "the forward pass was asked for it"
        return outputs.exact_kl
    if weigh:
        return importance_weighted_kl(
            outputs.log_probs, old_log_probs=batch.old_log_probs, ref_log_probs=batch.ref_log_probs, estimator=name
        )
    return kl_estimate(outputs.log_probs, batch.ref_log_probs, estimator=name)


def _make_policy_forward(
    config: ModelShape,
    dtype: torch.dtype,
    temperature: float,
    differentiate_entropy: bool,
    with_exact_kl: bool,
    gradient_checkpointing: bool,
) -> Callable[[Params, FrozenParams, PPOBatch], _PolicyOutputs]:
    """Return a function (policy, frozen, PPOBatch) -> `_PolicyOutputs`."""
    decoder = architecture_of(config)

    def per_token(models: FrozenParams, hidden: Tensor, targets: Tensor, *ref_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = decoder.logits(models["policy"], hidden, config=config, padded=True)
        log_probs = token_log_probs(logits, targets, temperature=temperature)
        entropies = entropy(logits if differentiate_entropy else logits.detach(), temperature=temperature)
        if not ref_hidden:
            return log_probs, entropies
        ref_logits = decoder.logits(models["reference"], *ref_hidden, config=config, padded=True)
        return log_probs, entropies, exact_kl(logits, ref_logits, temperature=temperature)

    def forward(params: Params, frozen: FrozenParams, batch: PPOBatch) -> _PolicyOutputs:
        policy = decoder.cast_for_compute(params, dtype)
        hidden = at_predictors(policy, batch, config, gradient_checkpointing=gradient_checkpointing)
        models, columns = {"policy": decoder.unembedding(policy)}, [hidden, batch.targets]
        if with_exact_kl:
            reference = decoder.cast_for_compute(frozen["reference"], dtype)
            models["reference"] = decoder.unembedding(reference)
            columns.append(at_predictors(reference, batch, config))
        log_probs, entropies, *kl = in_chunks(per_token, chunk_size(config.vocab_size))(models, *columns)
        return _PolicyOutputs(log_probs, entropies, kl[0] if kl else None, hidden)

    return forward


def _critic_values(params: Params, batch: PPOBatch, config: ModelShape, dtype: torch.dtype, **options: Any) -> Tensor:
    hidden = trunk_states(params["critic"]["trunk"], batch.rows, config, dtype, **options)
    return apply_head(params["critic"]["head"], gather_rows(hidden, batch.predictors))
