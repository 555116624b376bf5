"""PPO's objective: clipped policy loss, value loss, entropy bonus, and the KL to the reference where asked for."""

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.batches import PPOBatch
from rlhf.execution.program import Objective, SumOfLosses, add_results
from rlhf.kernels.remat import chunk_size, in_chunks
from rlhf.kl import exact_kl, kl_estimate
from rlhf.losses import ppo_policy_loss, ppo_value_loss
from rlhf.models.forward import at_predictors, unembedding_params
from rlhf.models.gpt2 import cast_for_compute, unembed
from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.heads import apply_head
from rlhf.ops import entropy, masked_sum, token_log_probs
from rlhf.tree import tree_map
from rlhf.types import FrozenParams, MetricSums, Params


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
        critic_config: shape of a separate critic; None for params["value_head"] on the policy's trunk, or no critic.
        dtype: of the models' forward and backward pass.
        temperature: as when sampling.
        clip_eps: of `rlhf.losses.ppo_policy_loss`.
        dual_clip: of the same.
        value_clip_eps: of `rlhf.losses.ppo_value_loss`.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus.
        loss_kl: KL to the reference in the loss, weighted by the batch's kl_coef; "exact" reads frozen["reference"].
        policy_coef: 0 leaves the value loss alone (critic warm-up).
        gradient_checkpointing: of `rlhf.models.gpt2.trunk`, in policy and critic.
    """

    def per_token(models: FrozenParams, hidden: Tensor, targets: Tensor, *ref_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = unembed(models["policy"], hidden, aligned=True)
        log_probs = token_log_probs(logits, targets, temperature=temperature)
        entropies = entropy(logits if entropy_coef else logits.detach(), temperature=temperature)
        ref_logits = [unembed(models["reference"], of_reference, aligned=True) for of_reference in ref_hidden]
        return log_probs, entropies, *(exact_kl(logits, of, temperature=temperature) for of in ref_logits)

    def of_policy(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums, Tensor]:
        policy = cast_for_compute(params["policy"], dtype)
        hidden = at_predictors(policy, batch, config, gradient_checkpointing=gradient_checkpointing)
        models, columns = {"policy": unembedding_params(policy)}, [hidden, batch.targets]
        if loss_kl == "exact":
            reference = cast_for_compute(frozen["reference"], dtype)
            models["reference"] = unembedding_params(reference)
            columns.append(at_predictors(reference, batch, config))
        log_probs, entropies, *exact = in_chunks(per_token, chunk_size(config.vocab_size))(models, *columns)
        policy_loss, metrics = ppo_policy_loss(
            log_probs,
            old_log_probs=batch.old_log_probs,
            advantages=batch.advantages,
            mask=batch.mask,
            clip_eps=clip_eps,
            dual_clip=dual_clip,
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

    def of_values(values: Tensor, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        loss, metrics = ppo_value_loss(
            values,
            old_values=batch.old_values,
            returns=batch.returns,
            mask=batch.mask,
            value_clip_eps=value_clip_eps,
        )
        return value_coef * loss, metrics

    def both(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        loss, metrics, hidden = of_policy(params, frozen, batch)
        if "value_head" not in params:
            return loss, metrics
        return add_results([(loss, metrics), of_values(apply_head(params["value_head"], hidden), batch)])

    def policy(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        params = params if policy_coef else tree_map(Tensor.detach, params)
        return of_policy(params, frozen, batch)[:2]

    def critic(params: Params, frozen: FrozenParams, batch: PPOBatch) -> tuple[Tensor, MetricSums]:
        assert critic_config is not None
        values = _critic(params, batch, critic_config, dtype, gradient_checkpointing=gradient_checkpointing)
        return of_values(values, batch)

    if critic_config is None:
        return both
    return SumOfLosses((policy, critic))


def _critic(params: Params, batch: PPOBatch, config: GPT2Config, dtype: torch.dtype, **options: Any) -> Tensor:
    hidden = at_predictors(cast_for_compute(params["critic"]["trunk"], dtype), batch, config, **options)
    return apply_head(params["critic"]["head"], hidden)
