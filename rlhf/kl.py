"""Kullback-Leibler divergence: per-token estimators, the exact value, and the coefficient's controller.

Everywhere KL means KL(policy || reference), in nats, and the samples come from the policy.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf.checks import check_same_shape, check_value
from rlhf.ops import scale_logits

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: KLEstimator = "k1") -> Tensor:
    """Estimate KL(policy || reference) per token from the log-probs of a token that the policy sampled.

        d  = log_probs - ref_log_probs
        k1 = d                    unbiased, may be negative
        k2 = d^2 / 2              biased, its gradient is the KL's own
        k3 = exp(-d) - 1 + d      unbiased, never negative

    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        log_probs: [...] float, nats, policy; differentiated.
        ref_log_probs: [...] float, nats, reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        [...] nats.

    Raises:
        ValueError: shapes differ, or the estimator is unknown.
    """
    check_same_shape("kl_estimate", log_probs=log_probs, ref_log_probs=ref_log_probs)
    difference = log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimate: estimator is {estimator!r}, expected one of k1, k2, k3")


def exact_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of the next-token distributions, summed over the whole vocabulary.

        sum_v p_v (log p_v - log q_v),   p = softmax(logits / temperature), q likewise

    Source: the definition; zero exactly where the logits differ by a constant.

    Args:
        logits: [..., V] float, policy; finite; differentiated.
        ref_logits: [..., V] float, reference; finite.
        temperature: > 0, applied to both.

    Returns:
        [...] float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: shapes differ, or temperature is not positive.
    """
    check_same_shape("exact_kl", logits=logits, ref_logits=ref_logits)
    log_p = torch.log_softmax(scale_logits(logits, temperature), dim=-1)
    log_q = torch.log_softmax(scale_logits(ref_logits, temperature), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def adaptive_kl_coef(
    kl_coef: float, kl: float, *, num_samples: int, target: float = 6.0, horizon: float = 10_000.0
) -> float:
    """Move the KL coefficient so that the KL per sequence approaches `target`.

        kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2,
    https://arxiv.org/abs/1909.08593; the constants are those of their code.

    Args:
        kl_coef: the present coefficient, > 0.
        kl: the mean KL per sequence just measured, nats.
        num_samples: sequences it was measured on, at most `horizon`.
        target: nats per sequence, > 0.
        horizon: sequences over which the coefficient moves by about 20% at most, > 0.

    Raises:
        ValueError: target or horizon is not positive, or num_samples is above horizon: the coefficient could turn
            negative.
    """
    check_value("adaptive_kl_coef", target > 0, "above 0", target=target)
    check_value("adaptive_kl_coef", horizon > 0, "above 0", horizon=horizon)
    check_value("adaptive_kl_coef", num_samples <= horizon, f"at most horizon = {horizon:g}", num_samples=num_samples)
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_samples / horizon)
