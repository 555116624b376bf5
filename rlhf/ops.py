"""Masked statistics, log-probabilities and entropy.

Masks are bool, True where a position counts. Masked positions may hold any value, NaN included, and receive zero
gradient. An all-False mask gives 0, never NaN. Half-precision inputs are upcast, and results are float32, or float64
for float64 inputs.
"""

import torch
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.checks import check_integer, check_mask, check_same_shape, check_value
from rlhf.types import Metrics, MetricSums

_VARIANCE_EPS = 1e-8


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the [] sum of `values` where `mask` is True.

    Args:
        values: float, any shape.
        mask: bool of the same shape.

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
    """Return the [] mean of `values` where `mask` is True; 0 if the mask is False everywhere.

    Args:
        values: float, any shape.
        mask: bool of the same shape.

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Return the [] variance of `values` where `mask` is True; 0 if the mask is False everywhere.

    Args:
        values: float, any shape.
        mask: bool of the same shape.
        unbiased: divide the sum of squares by n - 1 instead of n.

    Raises:
        ValueError: shapes differ.
        TypeError: mask is not bool.

    Example:
        >>> masked_var(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    values = upcast(values)
    centred, count = torch.where(mask, values - masked_mean(values, mask), 0.0), mask.sum()
    return centred.square().sum() / (count - int(unbiased)).clamp(min=1)


def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """Return values scaled to unit variance over the mask, with their mean shifted to zero or kept.

        (values - mean) / sqrt(var + 1e-8)  [+ mean]

    Source: `whiten` of Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences",
    https://github.com/openai/lm-human-preferences. The variance is biased, as there; TRL uses the unbiased one.

    Args:
        values: float, any shape.
        mask: bool of the same shape. None counts everything.
        shift_mean: shift the mean to 0; if False, the mean of `values` is kept.
        unbiased: divide the sum of squares by n - 1 instead of n.

    Returns:
        Tensor of the shape of `values`, float32 (float64 for float64 values); 0 where the mask is False.

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
    """Return the rows [..., D] of a table at given indices.

    The gradient of the table is summed in a fixed order, also in compiled code with several threads. There, the
    gradient of an embedding or of indexing depends on the timing of the threads.

    Args:
        table: [N, D] float; differentiated.
        index: [...] int64 in [0, N).

    Example:
        >>> gather_rows(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0]))
        tensor([[3.],
                [1.]])
    """
    rows = table.gather(0, index.reshape(-1, 1).expand(-1, table.shape[1]))
    return rows.view(*index.shape, table.shape[1])


def token_log_probs(logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at `targets`.

    Sampling, the reference and the update all use this definition. Filters that only change what is sampled (top-k,
    top-p, minimum length) are not part of it.

    Args:
        logits: [..., V] float; differentiated.
        targets: [...] int64 in [0, V).
        temperature: softmax temperature, above 0.

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
        logits: [..., V] float; differentiated. A logit of -inf stands for probability 0 and adds nothing to the result
            or the gradient; at least one logit must be finite.
        temperature: softmax temperature, above 0.

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
    """Return [...] bool, True where no token has a higher logit than the target. The mean is the token accuracy.

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
    """Return logits / temperature, in float32 for half-precision logits, which would lose the tail of the softmax.

    Args:
        logits: [..., V] float.
        temperature: softmax temperature, above 0.

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
    """Return `x` in float32, or unchanged if it is float64. The library sums in this dtype.

    Example:
        >>> upcast(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


def mean_metrics(sums: MetricSums) -> Metrics:
    """Return the mean of every metric: its sum divided by `sums["count"]`, or by 1 if the count is 0.

    Args:
        sums: the sums that a loss returns, added over the micro-batches of a global batch. The sum of the metric
            `loss/sft` is named `loss/sft_sum`.

    Raises:
        KeyError: there is no "count".
        ValueError: a name does not end in `_sum`.

    Example:
        >>> mean_metrics({"loss/sft_sum": torch.tensor(6.0), "count": torch.tensor(3)})
        {'loss/sft': tensor(2.)}
    """
    misnamed = [name for name in sums if name != "count" and not name.endswith("_sum")]
    check_value("mean_metrics", not misnamed, "named by their metric and `_sum`", sums=misnamed)
    count = torch.where(sums["count"] == 0, 1, sums["count"])
    return {name.removesuffix("_sum"): total / count for name, total in sums.items() if name != "count"}


@accelerated("compiled_ops.target_logits")
def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logits [...] of the targets [...] int64, from logits [..., V].

    Example:
        >>> target_logits(torch.tensor([[1.0, 5.0]]), torch.tensor([1]))
        tensor([5.])
    """
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
