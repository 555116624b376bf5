"""Token sampling: filters of logits, and draws from the inverse cumulative distribution function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.checks import check_value

_BLOCK = 128
"""Number of tokens in a block of the vocabulary."""


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float | Tensor = 1.0) -> Tensor:
    """Return logits that are -inf outside the `top_k` most likely tokens and outside the nucleus of mass `top_p`.

    Source: Fan et al. 2018, https://arxiv.org/abs/1805.04833 (top-k); Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751 (nucleus: the smallest set whose probability reaches p).

    Args:
        logits: [..., V] float, already divided by the temperature.
        top_k: number of tokens to keep; 0 keeps all. Tokens that tie with the k-th are kept too, except for 1, which is
            greedy.
        top_p: probability of the tokens to keep, in (0, 1]; 1 keeps all. At least one token is kept.

    Returns:
        [..., V] float, the filtered logits.

    Raises:
        ValueError: top_k or top_p is out of range.

    Example:
        >>> filter_logits(torch.tensor([3.0, 2.0, 1.0]), top_k=2)
        tensor([3., 2., -inf])
    """
    check_value("filter_logits", top_k >= 0, "at least 0", top_k=top_k)
    check_value("filter_logits", (top_p > 0) & (top_p <= 1), "in (0, 1]", top_p=top_p)
    if top_k == 1:
        token = torch.arange(logits.shape[-1], device=logits.device)
        logits = torch.where(token == logits.argmax(dim=-1, keepdim=True), logits, -torch.inf)
    elif 0 < top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = torch.where(logits >= weakest, logits, -torch.inf)
    if isinstance(top_p, Tensor) or top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ranked.softmax(dim=-1)
        before = cumulative(probs) - probs  # mass of the more likely tokens
        dropped = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = torch.where(dropped, -torch.inf, logits)
    return logits


@accelerated("blocked_sampling.sample_token")
def sample_token(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens from softmax(logits): the first token whose cumulative probability exceeds `uniform`.

    Exponentials and sums are computed in float64, so that every token has its probability to within about 1e-15. A
    block of the vocabulary is drawn first, and then a token in it. No sum therefore has more terms than there are
    tokens in a block, or blocks.

    Args:
        logits: [..., V] float. A token whose logit is -inf is never drawn.
        uniform: [...] float64 in [0, 1), from `rlhf.random.uniform_at`.

    Returns:
        [...] int64 in [0, V), even if logits are NaN.

    Example:
        >>> sample_token(torch.tensor([0.0, -torch.inf, 0.0]), torch.tensor(0.75, dtype=torch.float64))
        tensor(2)
    """
    blocks = _in_blocks(logits, fill=-torch.inf).double()  # their differences too are rounded to float64
    weights = (blocks - blocks.amax((-2, -1), keepdim=True)).exp()
    ends = cumulative(weights.sum(-1))
    threshold = uniform.unsqueeze(-1) * ends[..., -1:]
    block = (ends <= threshold).sum(-1, keepdim=True).clamp(max=ends.shape[-1] - 1)
    inside = cumulative(weights.gather(-2, block.unsqueeze(-1).expand(*block.shape, _BLOCK)).squeeze(-2))
    rest = (threshold - F.pad(ends, (1, 0)).gather(-1, block)).clamp(min=0)
    below = torch.nextafter(inside[..., -1:], torch.zeros_like(rest))
    rest = rest.minimum(below)  # some token exceeds it, however the sums are rounded
    return block.squeeze(-1) * _BLOCK + (inside <= rest).sum(-1)


def _in_blocks(x: Tensor, fill: float = 0.0) -> Tensor:
    """Return [..., V] reshaped to [..., N, 128] and padded with `fill`."""
    return F.pad(x, (0, -x.shape[-1] % _BLOCK), value=fill).view(*x.shape[:-1], -1, _BLOCK)


@accelerated("blocked_sampling.cumulative")
def cumulative(x: Tensor) -> Tensor:
    """Return the cumulative sums of `x`, [..., V], over the last dimension.

    Example:
        >>> cumulative(torch.tensor([1.0, 2.0]))
        tensor([1., 3.])
    """
    return x.cumsum(dim=-1)
