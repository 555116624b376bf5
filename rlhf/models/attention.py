"""Attention over packed rows, over prompts, and of one query over a key-value cache.

Scores get a bias: 0 where a query may see a key, -inf where not. Softmax is in float32 at least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.accelerate import accelerated


class AttentionLayout(NamedTuple):
    """Which tokens of a row see which, computed once for all layers."""

    bias: Tensor | None
    """[B, 1, T, T] float32; None where every row is one sequence, or where `bounds` say it."""
    bounds: Tensor | None
    """[S + 1] int32 (`rlhf.batches.Rows.bounds`), where a kernel takes them instead."""


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, a tensor per layer; written in place."""

    keys: tuple[Tensor, ...]
    """Each [B, N, H, S]."""
    values: tuple[Tensor, ...]
    """Each [B, N, S, H]."""


@accelerated("fused_attention.attention_layout")
def attention_layout(segments: Tensor | None, bounds: Tensor | None, like: Tensor, n_head: int) -> AttentionLayout:
    """Return who sees whom: each token the earlier ones of its own segment.

    Args:
        segments: [B, T] int64, equal for tokens that may see each other; None is one segment per row.
        bounds: [S + 1] int32, where segments lie, if each is in one piece; for kernels alone.
        like: [..., D], of the device and dtype of the hidden states.
        n_head: attention heads.
    """
    if segments is None:
        return AttentionLayout(None, None)
    allowed = causal(segments.shape[1], segments.device) & (segments[:, :, None] == segments[:, None, :])
    return AttentionLayout(additive_mask(allowed[:, None]), None)


@accelerated("fused_attention.self_attention")
def self_attention(qkv: Tensor, layout: AttentionLayout) -> Tensor:
    """Return the attention of whole rows to themselves.

    Args:
        qkv: [B, T, 3, N, H]: queries, keys and values; differentiated.
        layout: from `attention_layout`.

    Returns:
        [B, N, T, H] in the dtype of qkv.
    """
    q, k, v = heads_first(qkv)
    return attention(q, k, v, layout.bias)


@accelerated("fused_attention.attention")
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k' / sqrt(H) + bias) v.

    Source: Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762.

    Args:
        q: [B, N, T, H]; differentiated, as `k` and `v`.
        k: same.
        v: same.
        bias: [B, 1, T, T] or what broadcasts to it; every query sees a key. None is causal.

    Returns:
        [B, N, T, H] in the dtype of q.
    """
    bias = additive_mask(causal(q.shape[2], q.device)) if bias is None else bias
    products = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    return (products * q.shape[-1] ** -0.5 + bias).softmax(-1).to(q.dtype) @ v


@accelerated("fused_attention.prompt_attention")
def prompt_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal `attention` of prompts, one per row, of which no gradient is taken."""
    return attention(q, k, v, None)


@accelerated("fused_attention.init_kv_cache")
def init_kv_cache(like: Tensor, *, n_layer: int, batch_size: int, n_head: int, slots: int, width: int) -> KVCache:
    """Return an empty cache for `batch_size` sequences of up to `slots` tokens, of the dtype and device of `like`."""
    keys = [like.new_zeros(batch_size, n_head, width, slots) for _ in range(n_layer)]
    return KVCache(tuple(keys), tuple(like.new_zeros(batch_size, n_head, slots, width) for _ in keys))


def write_prompts(cache: KVCache, layer: int, k: Tensor, v: Tensor, rows: Tensor, source: Tensor) -> None:
    """Write the keys and values [U, N, P, H] of prompts into the first P slots of cache rows.

    Args:
        cache: written in place.
        layer: which.
        k: keys.
        v: values.
        rows: [R] int64, the cache's rows.
        source: [R] int64, the prompt that each of them gets.
    """
    width = k.shape[2]
    cache.keys[layer][rows, ..., :width] = k[source].transpose(-1, -2)
    cache.values[layer][rows, :, :width] = v[source]


@accelerated("fused_attention.decode_attention")
def decode_attention(qkv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, bias: Tensor) -> Tensor:
    """Write one new token per row into the cache, and return its attention over the tokens seen so far.

    Args:
        qkv: [B, 3, N, H]: query, key and value of the new tokens.
        keys: [B, N, H, S], written in place at slot `lengths`.
        values: [B, N, S, H], written alike.
        lengths: [B] int64, tokens already in the cache.
        bias: [B, U] float32 over the first U slots: 0 up to slot `lengths`, -inf after it.

    Returns:
        [B, N, H] in the dtype of qkv.
    """
    q, k, v = qkv.unbind(1)
    rows, length = torch.arange(len(q), device=q.device), bias.shape[1]
    keys[rows, :, :, lengths] = k
    values[rows, :, lengths] = v
    return attend_to_cache(q, keys[..., :length], values[:, :, :length], bias)


@accelerated("fused_attention.attend_to_cache")
def attend_to_cache(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q K / sqrt(H) + bias) V of one query per row.

    Args:
        q: [B, N, H].
        keys: [B, N, H, U].
        values: [B, N, U, H].
        bias: [B, U]; every row sees a slot.

    Returns:
        [B, N, H] in the dtype of q.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q[:, :, None].to(wide) @ keys.to(wide)  # bf16 is slow here
    weights = (scores * q.shape[-1] ** -0.5 + bias[:, None, None]).softmax(-1)
    return (weights @ values.to(wide))[:, :, 0].to(q.dtype)


def heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values, each [B, N, T, H], of [B, T, 3, N, H]."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


@accelerated("fused_attention.additive_mask")
def additive_mask(allowed: Tensor) -> Tensor:
    """Return float32: 0 where it is allowed, else -inf."""
    return torch.where(allowed, 0.0, -torch.inf)


def causal(length: int, device: torch.device) -> Tensor:
    """Return [T, T] bool: query t may see key s where s <= t."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
