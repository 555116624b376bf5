"""Best-of-n sampling: its expected value from N samples, and a bound on its KL to the policy that it samples from."""

import math

import torch
from torch import Tensor

from rlhf.checks import check_same_shape, check_value
from rlhf.ops import upcast


def best_of_n(proxy: Tensor, values: Tensor, n: int) -> Tensor:
    """Return the mean, over all n-subsets of N samples, of the value of the subset's best sample by the proxy.

        1 / C(N, n) sum_{S, |S| = n} values[argmax_{i in S} proxy_i]
        = sum_i w_i values_i,   w_i = (C(b_i, n) - C(a_i, n)) / (C(N, n) (b_i - a_i))

    with a_i the number of samples below sample i by the proxy, and b_i the number not above it, itself included.
    Samples of equal proxy share their weight. The result is an unbiased estimate of the value of best-of-n for every n
    up to N, from the same N samples.

    Source: Nakano et al. 2021, "WebGPT", appendix I, https://arxiv.org/abs/2112.09332; ties are ours.

    Args:
        proxy: [..., N] float, reward units, score by which the best sample is chosen; constant.
        values: [..., N] float, values to average, such as the proxy itself or a gold score; differentiated.
        n: number of samples per subset, in [1, N]; 1 gives the mean of the values, N the value of the best sample.

    Returns:
        [...] units of the values, float32 at least.

    Raises:
        ValueError: shapes differ, or n is out of range.

    Example:
        >>> proxy, gold = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 6.0, 3.0])
        >>> [round(float(best_of_n(proxy, gold, n)), 4) for n in (1, 2, 3)]
        [3.0, 4.0, 3.0]
    """
    check_same_shape("best_of_n", proxy=proxy, values=values)
    count = proxy.shape[-1] if proxy.ndim else 0
    check_value("best_of_n", 1 <= n <= count, f"from 1 to the {count} samples", n=n)
    subsets = math.comb(count, n)
    shares = [math.comb(rank, n) / subsets for rank in range(count + 1)]  # of subsets among the lowest `rank` samples
    share = torch.tensor(shares, dtype=torch.float64, device=proxy.device)
    proxy = proxy.detach()
    below = (proxy.unsqueeze(-1) > proxy.unsqueeze(-2)).sum(dim=-1)
    not_above = (proxy.unsqueeze(-1) >= proxy.unsqueeze(-2)).sum(dim=-1)
    weights = (share[not_above] - share[below]) / (not_above - below)
    values = upcast(values)
    return (weights.to(values.dtype) * values).sum(dim=-1)


def bon_kl_bound(n: int) -> float:
    """Return an upper bound on KL(best-of-n || policy) in nats per completion.

        log n - (n - 1) / n

    The bound is the KL of best-of-n if no two completions have equal scores and none has a large probability. Otherwise
    the KL is smaller.

    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", theorem 1,
    https://arxiv.org/abs/2401.01879, who show that the formula of earlier papers is a bound.

    Args:
        n: number of completions per prompt, at least 1.

    Raises:
        ValueError: n is below 1.

    Example:
        >>> round(bon_kl_bound(4), 4), bon_kl_bound(1)
        (0.6363, 0.0)
    """
    check_value("bon_kl_bound", n >= 1, "at least 1", n=n)
    return math.log(n) - (n - 1) / n
