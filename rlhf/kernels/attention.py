"""Attention in the forms that are fast: over whole sequences, and of one query over a cache.

Scores get a bias: 0 where a query may see a key, -inf where not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PLAIN = 512
"""Up to this length the plain form is faster in bf16 on a CPU."""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(H) + bias) v.

    Source: Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762.

    Args:
        q: [B, N, T, H]; differentiated, as `k` and `v`.
        k: same.
        v: same.
        bias: [B, 1, T, T] or what broadcasts to it; every query sees a key. None is causal.

    Returns:
        [B, N, T, H] in the dtype of q.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # torch's fused backward pass is slow there
        length = q.shape[2]
        if length > _PLAIN:
            return attention(q.float(), k.float(), v.float(), bias).to(q.dtype)
        bias = _bias(_causal(length, q.device)) if bias is None else bias
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
        if not torch.compiler.is_compiling():
            return scores.softmax(-1).to(q.dtype) @ v
        highest = scores.detach().amax(-1, keepdim=True)  # a constant: it cancels
        weights: Tensor = _Exp.apply(scores - highest)  # type: ignore[no-untyped-call]
        return (weights @ v / weights.float().sum(-1, keepdim=True)).to(q.dtype)  # one pass less than the softmax
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)


def packed_attention(qkv: Tensor, bounds: Tensor) -> Tensor:
    """`attention` of each sequence to itself, causal, on a GPU: FlashAttention, which never looks at another sequence.

    Source: Dao 2023, "FlashAttention-2", https://arxiv.org/abs/2307.08691, as torch has it.

    Args:
        qkv: [B, T, 3, N, H] bfloat16 on a GPU; differentiated.
        bounds: [S + 1] int32, as `rlhf.batches.Rows.bounds`.

    Returns:
        [B, N, T, H].
    """
    q, k, v = qkv.flatten(0, 1).unbind(1)
    length = qkv.shape[1]  # no sequence is longer
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, length, length, 0.0, True, False
    )[0]
    return attended.view(*qkv.shape[:2], *attended.shape[1:]).transpose(1, 2)


def packs(like: Tensor, heads: int) -> bool:
    """Whether `packed_attention` takes states like these [..., D]."""
    return like.is_cuda and like.dtype == torch.bfloat16 and like.shape[-1] % (8 * heads) == 0


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """softmax(q K / sqrt(H) + bias) V of one query per row, for CPUs.

    Args:
        q: [B, N, H].
        keys: [B, N, H, U].
        values: [B, N, U, H].
        bias: [B, U]; every row sees a slot.

    Returns:
        [B, N, H] in the dtype of q.
    """
    scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
    if torch.compiler.is_compiling():  # sums of products become vector code; products of so small matrices cost calls
        scores = (q.to(wide)[..., None] * keys.to(wide)).sum(-2)
        weights = (scores * scale + bias[:, None]).softmax(-1)
        return (weights[..., None] * values.to(wide)).sum(-2).to(q.dtype)
    scores = q[:, :, None].to(wide) @ keys.to(wide)  # bf16 is slow here
    weights = (scores * scale + bias[:, None, None]).softmax(-1)
    return (weights @ values.to(wide))[:, :, 0].to(q.dtype)


def segment_bias(segments: Tensor) -> Tensor:
    """[B, 1, T, T] float32: 0 where query t may see key s (s <= t in the same segment of [B, T]), else -inf."""
    allowed = _causal(segments.shape[1], segments.device) & (segments[:, :, None] == segments[:, None, :])
    return _bias(allowed[:, None])


def _bias(allowed: Tensor) -> Tensor:
    """float32: 0 where it is allowed, else -inf.

    Compiled code takes the mask's logarithm, because it keeps what took one; anything cheaper it makes in every layer.
    """
    return allowed.float().log() if torch.compiler.is_compiling() else torch.where(allowed, 0.0, -torch.inf)


def _causal(length: int, device: torch.device) -> Tensor:
    """[T, T] bool: query t may see key s when s <= t."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class _Exp(torch.autograd.Function):
    """exp in bfloat16, which its gradient takes as it is: a compiler would keep it in float32 beside."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp().bfloat16()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (exp,) = ctx.saved_tensors
        return gradient.float() * exp.float()
