"""Kullback-Leibler divergence: per-token estimators, the exact value, and the controller of the coefficient.

KL always means KL(policy || reference), in nats, and samples come from the policy. Half-precision inputs are upcast to
float32; float64 stays float64.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.checks import check_same_shape, check_value
from rlhf.ops import scale_logits, upcast

KLEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratio of two policies above which `exp` is continued by its tangent. A ratio of e^20 = 4.9e8 is outside every
trust region, yet its squares can still be summed in float32. verl clamps the log-ratio at the same value."""


def ratio_of(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), continued by its tangent above `MAX_LOG_RATIO`.

    The result and its gradient are finite, and the gradient is never 0. A plain clamp would have gradient 0 above the
    bound, so that a token whose probability has exploded would never recover. A plain `exp` overflows at 89, where a
    gradient of 0 times infinity is NaN.

    Args:
        log_ratio: [...] float, difference of two log-probs.

    Example:
        >>> ratio_of(torch.tensor([0.0, -torch.inf])), ratio_of(torch.tensor(1e4)).isfinite()
        (tensor([1., 0.]), tensor(True))
    """
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() + _beyond(log_ratio)


def _beyond(log_ratio: Tensor) -> Tensor:
    """Return the increase of the tangent above `MAX_LOG_RATIO`; 0 below."""
    return math.exp(MAX_LOG_RATIO) * torch.relu(log_ratio - MAX_LOG_RATIO)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: KLEstimator = "k1") -> Tensor:
    """Estimate KL(policy || reference) per token from the log-probs of a token that the policy sampled.

        d  = log_probs - ref_log_probs
        k1 = d                    unbiased, may be negative
        k2 = d^2 / 2              biased
        k3 = exp(-d) - 1 + d      unbiased, never negative

    As estimates of the KL, k1 and k3 are unbiased. In a loss, what matters is the mean of the gradient over samples of
    the policy: for k1 it is 0, for k2 it is the gradient of KL(policy || reference), and for k3 it is the gradient of
    KL(reference || policy), the other direction. All three are wrong once the policy has moved away from the one that
    sampled; `importance_weighted_kl` then still has the gradient of KL(policy || reference).

    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html. Where -d is above
    `MAX_LOG_RATIO`, the exponential of k3 is continued by its tangent (`ratio_of`).

    Args:
        log_probs: [...] float, nats, policy; differentiated.
        ref_log_probs: [...] float, nats, reference; differentiated.
        estimator: "k1", "k2" or "k3".

    Returns:
        [...] float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: shapes differ, or the estimator is unknown.

    Example:
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0]), estimator="k2")
        tensor([2.])
    """
    check_same_shape("kl_estimate", log_probs=log_probs, ref_log_probs=ref_log_probs)
    difference = upcast(log_probs) - upcast(ref_log_probs)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1((-difference).clamp(max=MAX_LOG_RATIO)) + _beyond(-difference) + difference
    raise ValueError(f"kl_estimate: estimator is {estimator!r}, expected one of k1, k2, k3")


def importance_weighted_kl(
    log_probs: Tensor, *, old_log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator = "k3"
) -> Tensor:
    """Estimate KL(policy || reference) per token from tokens that an older policy sampled, gradient included.

        r k,   r = exp(log_probs - old_log_probs),   k of `kl_estimate`

    The mean of r k over tokens of the older policy equals the mean of k over tokens of the policy. With k1 and k3, that
    mean is the KL, and the mean of the gradient is the gradient of the KL; with k2, neither holds. The estimate is per
    token, in states that the older policy visited.

    Source: importance sampling of Schulman's estimators, as used with k3 by DeepSeek-AI 2025, "DeepSeek-V3.2",
    section 3.1, https://arxiv.org/abs/2512.02556.

    Args:
        log_probs: [...] float, nats, policy; differentiated.
        old_log_probs: [...] float, nats, policy that sampled; constant.
        ref_log_probs: [...] float, nats, reference; constant.
        estimator: "k1", "k2" or "k3".

    Returns:
        [...] float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: shapes differ, or the estimator is unknown.

    Example:
        >>> log_probs, ref_log_probs = torch.tensor([-1.0]), torch.tensor([-3.0])
        >>> importance_weighted_kl(log_probs, old_log_probs=log_probs, ref_log_probs=ref_log_probs, estimator="k1")
        tensor([2.])
    """
    check_same_shape("importance_weighted_kl", log_probs=log_probs, old_log_probs=old_log_probs)
    ratio = ratio_of(upcast(log_probs) - upcast(old_log_probs.detach()))
    return ratio * kl_estimate(log_probs, ref_log_probs.detach(), estimator=estimator)


def exact_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Return KL(policy || reference) of next-token distributions, summed over the whole vocabulary.

        sum_v p_v (log p_v - log q_v),   p = softmax(logits / temperature), q likewise

    The result is zero where the logits differ by a constant.

    Args:
        logits: [..., V] float, policy; differentiated. A logit of -inf stands for probability 0, here and in
            `ref_logits`; at least one logit must be finite.
        ref_logits: [..., V] float, reference; differentiated.
        temperature: softmax temperature of both, above 0.

    Returns:
        [...] float32 (float64 for float64 logits), nats. A token of probability 0 under the policy adds nothing. A
        token that only the policy allows makes the KL infinite; it is a constant in the gradient.

    Raises:
        ValueError: shapes differ, or temperature is not positive.

    Example:
        >>> logits = torch.tensor([1.0, 2.0])
        >>> exact_kl(logits, logits + 5.0)
        tensor(0.)
    """
    check_same_shape("exact_kl", logits=logits, ref_logits=ref_logits)
    log_p = torch.log_softmax(scale_logits(logits, temperature), dim=-1)
    log_q = torch.log_softmax(scale_logits(ref_logits, temperature), dim=-1)
    impossible = log_p == -torch.inf  # p log p tends to 0, where 0 * inf is NaN
    unsupported = (log_q == -torch.inf) & ~impossible
    difference = torch.where(impossible | unsupported, 0.0, log_p - log_q)
    return torch.where(unsupported, torch.inf, log_p.exp() * difference).sum(dim=-1)


def adaptive_kl_coef(
    kl_coef: float | Tensor,
    kl: float | Tensor,
    *,
    num_samples: int | Tensor,
    target: float | Tensor = 6.0,
    horizon: float | Tensor = 10_000.0,
) -> Any:
    """Return the KL coefficient, adapted so that the KL per sequence approaches `target`.

        kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2,
    https://arxiv.org/abs/1909.08593; the constants are those of the authors' code.

    Args:
        kl_coef: current coefficient, above 0. All arguments are numbers or [] tensors, so that `vmap` and `grad` may
            be applied.
        kl: measured mean KL per sequence, in nats.
        num_samples: number of sequences in the measurement, at most `horizon`.
        target: target of the KL, in nats per sequence, above 0.
        horizon: number of sequences over which the coefficient changes by at most about 20%, above 0.

    Returns:
        The new coefficient: a float, or a [] tensor if an argument is a tensor.

    Raises:
        ValueError: target or horizon is not positive, or num_samples is above horizon, in which case the coefficient
            could become negative.

    Example:
        >>> round(adaptive_kl_coef(0.1, 12.0, num_samples=1000, target=6.0), 6)
        0.102
    """
    check_value("adaptive_kl_coef", target > 0, "above 0", target=target)
    check_value("adaptive_kl_coef", horizon > 0, "above 0", horizon=horizon)
    most = "at most horizon" if isinstance(horizon, Tensor) else f"at most horizon = {horizon:g}"
    check_value("adaptive_kl_coef", num_samples <= horizon, most, num_samples=num_samples)
    error = kl / target - 1.0
    error = error.clamp(-0.2, 0.2) if isinstance(error, Tensor) else min(max(error, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)


def budget_kl_coef(
    kl_coef: float | Tensor, kl: float | Tensor, *, budget: float | Tensor, floor: float | Tensor, most: float = 1.5
) -> Any:
    """Return the KL coefficient, raised where the KL per sequence exceeds a budget and lowered to `floor` below it.

        max(floor, kl_coef * clip(kl / budget, 1 / most, most))

    A budget is a bound, not a target. Below it the coefficient falls back to `floor`, so a run that stays within its
    budget equals a run with the fixed coefficient `floor`. The coefficient responds within a few iterations, whereas
    that of `adaptive_kl_coef` takes its whole horizon.

    Source: Schulman et al. 2017, section 4, https://arxiv.org/abs/1707.06347, whose multiplicative controller has the
    factor 2.

    Args:
        kl_coef: current coefficient, at least `floor`. All arguments except `most` are numbers or [] tensors.
        kl: measured mean KL per sequence, in nats.
        budget: KL budget in nats per sequence, above 0; infinity keeps `floor`.
        floor: lowest coefficient, at least 0; with 0 the coefficient stays 0.
        most: largest factor of one call, above 1.

    Returns:
        The new coefficient: a float, or a [] tensor if an argument is a tensor.

    Raises:
        ValueError: budget is not positive, or most is not above 1.

    Example:
        >>> budget_kl_coef(0.1, 30.0, budget=10.0, floor=0.05), budget_kl_coef(0.06, 1.0, budget=10.0, floor=0.05)
        (0.15000000000000002, 0.05)
    """
    check_value("budget_kl_coef", budget > 0, "above 0", budget=budget)
    check_value("budget_kl_coef", most > 1, "above 1", most=most)
    used = kl / budget
    factor = used.clamp(1 / most, most) if isinstance(used, Tensor) else min(max(used, 1 / most), most)
    raised = kl_coef * factor
    if isinstance(raised, Tensor) or isinstance(floor, Tensor):
        return torch.maximum(torch.as_tensor(raised), torch.as_tensor(floor))
    return max(floor, raised)
