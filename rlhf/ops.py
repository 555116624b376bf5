"""Masked statistics and the one definition of log-probabilities and entropy.

Masks are bool, True where a position counts. Positions with False may hold anything, NaN included, and
receive zero gradient. An all-False mask gives zero, never NaN.

Everything is computed and returned in float32 at least: half-precision inputs are upcast first, float64 stays float64.
"""

import torch
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.checks import check_integer, check_mask, check_same_shape, check_value
from rlhf.types import Metrics, MetricSums

_VARIANCE_EPS = 1e-8


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[] sum of `values` where `mask` is True, float32 at least.

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.
    """
    check_mask("masked_sum", mask, values=values)
    return torch.where(mask, upcast(values), 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[] mean of `values` where `mask` is True, float32 at least; 0 of nothing. Errors as `masked_sum`."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """[] variance of `values` where `mask` is True; `unbiased` divides by n - 1. Dtype and errors as `masked_sum`."""
    values = upcast(values)
    centred, count = torch.where(mask, values - masked_mean(values, mask), 0.0), mask.sum()
    return centred.square().sum() / (count - int(unbiased)).clamp(min=1)


def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """Scale to unit variance over the mask; shift to zero mean too, or keep the mean.

        (values - mean) / sqrt(var + 1e-8)  [+ mean]

    Source: `whiten` of Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences",
    https://github.com/openai/lm-human-preferences (biased variance, as there; TRL uses the unbiased one).

    Args:
        values: float, any shape.
        mask: bool of the same shape; None counts everything.
        shift_mean: whether the result has mean 0; otherwise the mean of `values` is kept.
        unbiased: divide the squares by n - 1 instead of n.

    Returns:
        `values`' shape, float32 (float64 for float64 values); 0 where the mask is False.

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    check_mask("whiten", mask, values=values)
    values = torch.where(mask, upcast(values), 0.0)
    mean, variance = masked_mean(values, mask), masked_var(values, mask, unbiased=unbiased)
    whitened = (values - mean) * torch.rsqrt(variance + _VARIANCE_EPS)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [N, D] by index [...] int64: [..., D].

    The gradient with respect to the table adds up in a fixed order, also in compiled code with several threads, where
    that of an embedding or of indexing is a race.
    """
    rows = table.gather(0, index.reshape(-1, 1).expand(-1, table.shape[1]))
    return rows.view(*index.shape, table.shape[1])


def token_log_probs(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `targets`, in float32 at least.

    This is the one definition used in sampling, in the reference and in the update. Filters that only shape
    what is sampled (top-k, top-p, minimal length) are not part of it.

    Args:
        logits: [..., V] float; differentiated.
        targets: [...] int64 in [0, V).
        temperature: > 0, dimensionless.

    Returns:
        [...] float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: shapes do not match, or temperature is not positive.
        TypeError: targets is not int64.
    """
    check_integer("token_log_probs", targets=targets)
    check_same_shape("token_log_probs", targets=targets, **{"logits[..., 0]": logits[..., 0]})
    scaled = scale_logits(logits, temperature)
    return target_logits(scaled, targets) - torch.logsumexp(scaled, dim=-1)


def entropy(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) over the last axis.

        H = logsumexp(z) - sum_v softmax(z)_v z_v,   z = logits / temperature

    Args:
        logits: [..., V] float; differentiated. -inf is a token of probability 0, which adds nothing, nor to the
            gradient; one logit at least is finite.
        temperature: > 0.

    Returns:
        [...] float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: temperature is not positive.
    """
    scaled = scale_logits(logits, temperature)
    possible = torch.where(scaled == -torch.inf, 0.0, scaled)  # p log p tends to 0, where 0 * inf is NaN
    return torch.logsumexp(scaled, dim=-1) - (torch.softmax(scaled, dim=-1) * possible).sum(dim=-1)


def is_argmax(logits: Tensor, targets: Tensor) -> Tensor:
    """[...] bool: whether no token has a higher logit than the target. The mean is the token accuracy.

    Args:
        logits: [..., V] float.
        targets: [...] int64 in [0, V).
    """
    scaled = scale_logits(logits, 1.0)  # as `token_log_probs` has it: compiled code takes target and maximum from there
    return target_logits(scaled, targets) >= scaled.amax(dim=-1, keepdim=True).squeeze(-1)


def scale_logits(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """logits / temperature, at least float32: low-precision logits lose the tail of the softmax.

    Raises:
        ValueError: temperature is not positive.
    """
    check_value(
        "scale_logits", temperature > 0, "above 0 (for the most likely token use top_k=1)", temperature=temperature
    )
    wide = upcast(logits)
    return wide if not isinstance(temperature, Tensor) and temperature == 1.0 else wide / temperature


def upcast(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that already: the dtype in which the library adds up."""
    return x if x.dtype == torch.float64 else x.float()


def mean_metrics(sums: MetricSums) -> Metrics:
    """Every sum divided by `sums["count"]` (by 1 when that is 0), without the count itself.

    Raises:
        KeyError: there is no "count".
    """
    count = torch.where(sums["count"] == 0, 1, sums["count"])
    return {name: total / count for name, total in sums.items() if name != "count"}


@accelerated("compiled_ops.target_logits")
def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """[...] logits [..., V] of the targets [...] int64."""
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
