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
    """Return the [] sum of `values` where `mask` is True, float32 at least.

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    check_mask("masked_sum", mask, values=values)
    return torch.where(mask, upcast(values), 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the [] mean of `values` where `mask` is True, float32 at least; 0 of nothing. Errors as `masked_sum`.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Return the [] variance of `values` where `mask` is True; dtype and errors as `masked_sum`.

    Args:
        values: float, any shape.
        mask: bool of the same shape.
        unbiased: divide the squares by n - 1 instead of n.

    Example:
        >>> masked_var(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    values = upcast(values)
    centred, count = torch.where(mask, values - masked_mean(values, mask), 0.0), mask.sum()
    return centred.square().sum() / (count - int(unbiased)).clamp(min=1)


def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """Return values scaled to unit variance over the mask, with zero mean or with their own.

        (values - mean) / sqrt(var + 1e-8)  [+ mean]

    Source: `whiten` of Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences",
    https://github.com/openai/lm-human-preferences (biased variance, as there; TRL uses the unbiased one).

    Args:
        values: float, any shape.
        mask: bool of the same shape; None counts everything.
        shift_mean: shift the mean to 0; False keeps the mean of `values`.
        unbiased: divide the squares by n - 1 instead of n.

    Returns:
        `values`' shape, float32 (float64 for float64 values); 0 where the mask is False.

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    check_mask("whiten", mask, values=values)
    values = torch.where(mask, upcast(values), 0.0)
    mean, variance = masked_mean(values, mask), masked_var(values, mask, unbiased=unbiased)
    whitened = (values - mean) * torch.rsqrt(variance + _VARIANCE_EPS)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return rows [..., D] of a table [N, D] by index [...] int64.

    The gradient with respect to the table is summed in a fixed order, in compiled code with several threads too, where
    that of an embedding or of indexing depends on a race.

    Example:
        >>> gather_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0]))
        tensor([[3.],
                [1.]])
    """
    rows = table.gather(0, index.reshape(-1, 1).expand(-1, table.shape[1]))
    return rows.view(*index.shape, table.shape[1])


def token_log_probs(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at `targets`, in float32 at least.

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

    Example:
        >>> token_log_probs(torch.zeros(2, 4), torch.tensor([0, 3])).exp()
        tensor([0.2500, 0.2500])
    """
    check_integer("token_log_probs", targets=targets)
    check_same_shape("token_log_probs", targets=targets, **{"logits[..., 0]": logits[..., 0]})
    scaled = scale_logits(logits, temperature)
    return target_logits(scaled, targets) - torch.logsumexp(scaled, dim=-1)


def entropy(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Return the entropy of softmax(logits / temperature) over the last axis.

        H = logsumexp(z) - sum_v softmax(z)_v z_v,   z = logits / temperature

    Args:
        logits: [..., V] float; differentiated. -inf is a token of probability 0, which adds nothing, nor to the
            gradient; one logit at least is finite.
        temperature: > 0.

    Returns:
        [...] float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: temperature is not positive.

    Example:
        >>> entropy(torch.zeros(4)).exp()
        tensor(4.)
    """
    scaled = scale_logits(logits, temperature)
    possible = torch.where(scaled == -torch.inf, 0.0, scaled)  # p log p tends to 0, where 0 * inf is NaN
    return torch.logsumexp(scaled, dim=-1) - (torch.softmax(scaled, dim=-1) * possible).sum(dim=-1)


def is_argmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Return [...] bool, True where no token has a higher logit than the target; the mean is the token accuracy.

    Args:
        logits: [..., V] float.
        targets: [...] int64 in [0, V).

    Example:
        >>> is_argmax(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1, 0]))
        tensor([ True, False])
    """
    scaled = scale_logits(logits, 1.0)  # as `token_log_probs` has it: compiled code takes target and maximum from there
    return target_logits(scaled, targets) >= scaled.amax(dim=-1, keepdim=True).squeeze(-1)


def scale_logits(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return logits / temperature, at least float32: low-precision logits lose the tail of the softmax.

    Raises:
        ValueError: temperature is not positive.

    Example:
        >>> scale_logits(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 0.5)
        tensor([2., 4.])
    """
    check_value(
        "scale_logits", temperature > 0, "above 0 (for the most likely token use top_k=1)", temperature=temperature
    )
    wide = upcast(logits)
    return wide if not isinstance(temperature, Tensor) and temperature == 1.0 else wide / temperature


def upcast(x: Tensor) -> Tensor:
    """Return `x` in float32, or float64 `x` itself: the dtype in which the library sums.

    Example:
        >>> upcast(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def mean_metrics(sums: MetricSums) -> Metrics:
    """Return every sum divided by `sums["count"]` (by 1 when that is 0), without the count itself.

    Raises:
        KeyError: there is no "count".

    Example:
        >>> mean_metrics({"loss/sft": torch.tensor(6.0), "count": torch.tensor(3)})
        {'loss/sft': tensor(2.)}
    """
    count = torch.where(sums["count"] == 0, 1, sums["count"])
    return {name: total / count for name, total in sums.items() if name != "count"}


@accelerated("compiled_ops.target_logits")
def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logits [...] of targets [...] int64, from logits [..., V].

    Example:
        >>> target_logits(torch.tensor([[1.0, 5.0]]), torch.tensor([1]))
        tensor([5.])
    """
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
