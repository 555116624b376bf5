"""Attention over packed rows, over prompts, and of one query over a key-value cache.

Scores get a bias: 0 where a query may see a key, -inf where not. Softmax is in float32 at least.

N query heads share G key-value heads, of which query head n reads head n // (N / G); G is N without sharing.

Source: Ainslie et al. 2023, "GQA", https://arxiv.org/abs/2305.13245.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.field_docs import documented


@documented
class AttentionLayout(NamedTuple):
    """The mask of self-attention over packed rows, computed once for all layers."""

    bias: Tensor | None
    """[B, 1, T, T] float32; None where every row is one sequence, or `bounds` replace it."""
    bounds: Tensor | None
    """[S + 1] int32 (`rlhf.batches.Rows.bounds`), where a kernel reads them instead of the bias."""


@documented
class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, a tensor per layer; written in place."""

    keys: tuple[Tensor, ...]
    """Each [B, G, H, S]."""
    values: tuple[Tensor, ...]
    """Each [B, G, S, H]."""


@accelerated("fused_attention.attention_layout")
def attention_layout(segments: Tensor | None, bounds: Tensor | None, like: Tensor, width: int) -> AttentionLayout:
    """Return the layout in which each token sees itself and the earlier tokens of its segment.

    Args:
        segments: [B, T] int64, equal for tokens that may see each other; None is one segment per row.
        bounds: [S + 1] int32, where segments start, if each is contiguous; read by kernels alone.
        like: any tensor with the device and dtype of the hidden states.
        width: H, of a head.
    """
    if segments is None:
        return AttentionLayout(None, None)
    allowed = causal(segments.shape[1], segments.device) & (segments[:, :, None] == segments[:, None, :])
    return AttentionLayout(additive_mask(allowed[:, None]), None)


@accelerated("fused_attention.self_attention")
def self_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """Return self-attention over packed rows.

    Args:
        q: [B, N, T, H]; differentiated, as `k` and `v`.
        k: [B, G, T, H].
        v: same.
        layout: from `attention_layout`.

    Returns:
        [B, N, T, H] in the dtype of q.
    """
    return attention(q, k, v, layout.bias)


@accelerated("fused_attention.attention")
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k' / sqrt(H) + bias) v.

    Source: Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762.

    Args:
        q: [B, N, T, H]; differentiated, as `k` and `v`.
        k: [B, G, T, H].
        v: same.
        bias: [B, 1, T, T] or what broadcasts to it; every query has a key with a finite bias. None is causal.

    Returns:
        [B, N, T, H] in the dtype of q.

    Example:
        >>> q, v = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [3.0, 2.0]]]])
        >>> attention(q, q, v, None)
        tensor([[[[1., 0.],
                  [2., 1.]]]])
    """
    bias = additive_mask(causal(q.shape[2], q.device)) if bias is None else bias
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    products = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    return (products * q.shape[-1] ** -0.5 + bias).softmax(-1).to(q.dtype) @ v


@accelerated("fused_attention.prompt_attention")
def prompt_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal `attention` [B, N, T, H] of prompts, one per row; not differentiated."""
    return attention(q, k, v, None)


@accelerated("fused_attention.init_kv_cache")
def init_kv_cache(like: Tensor, *, n_layer: int, batch_size: int, n_kv_head: int, slots: int, width: int) -> KVCache:
    """Return an empty cache for `batch_size` sequences of up to `slots` tokens, of the dtype and device of `like`."""
    keys = [like.new_zeros(batch_size, n_kv_head, width, slots) for _ in range(n_layer)]
    return KVCache(tuple(keys), tuple(like.new_zeros(batch_size, n_kv_head, slots, width) for _ in keys))


def write_prompts(cache: KVCache, layer: int, k: Tensor, v: Tensor, rows: Tensor, source: Tensor) -> None:
    """Write the keys and values [U, G, P, H] of prompts into the first P slots of cache rows.

    Args:
        cache: written in place.
        layer: index of the layer.
        k: keys.
        v: values.
        rows: [R] int64, the cache's rows.
        source: [R] int64, the prompt of each of these rows.
    """
    width = k.shape[2]
    cache.keys[layer][rows, ..., :width] = k[source].transpose(-1, -2)
    cache.values[layer][rows, :, :width] = v[source]


@accelerated("fused_attention.decode_attention")
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, bias: Tensor
) -> Tensor:
    """Write one new token per row into the cache, and return its attention over the tokens seen so far.

    Args:
        q: [B, N, H], queries of the new tokens.
        k: [B, G, H], their keys.
        v: same, their values.
        keys: [B, G, H, S], written in place at slot `lengths`.
        values: [B, G, S, H], written alike.
        lengths: [B] int64, tokens already in the cache.
        bias: [B, U] float32 over the first U slots: 0 up to slot `lengths`, -inf after it.

    Returns:
        [B, N, H] in the dtype of q.
    """
    rows, length = torch.arange(len(q), device=q.device), bias.shape[1]
    keys[rows, :, :, lengths] = k
    values[rows, :, lengths] = v
    return attend_to_cache(q, keys[..., :length], values[:, :, :length], bias)


@accelerated("fused_attention.attend_to_cache")
def attend_to_cache(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q K / sqrt(H) + bias) V of one query per row.

    Args:
        q: [B, N, H].
        keys: [B, G, H, U].
        values: [B, G, U, H].
        bias: [B, U]; every row has a slot with a finite bias.

    Returns:
        [B, N, H] in the dtype of q.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])  # [B, G, N / G, H]
    scores = grouped.to(wide) @ keys.to(wide)  # bf16 is slow here
    weights = (scores * q.shape[-1] ** -0.5 + bias[:, None, None]).softmax(-1)
    return (weights @ values.to(wide)).flatten(1, 2).to(q.dtype)


def repeat_heads(x: Tensor, n_head: int) -> Tensor:
    """Return keys or values [B, N, T, H] for each of N = `n_head` query heads, of [B, G, T, H].

    Example:
        >>> repeat_heads(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), 4).flatten()
        tensor([1., 1., 2., 2.])
    """
    return x if x.shape[1] == n_head else x.repeat_interleave(n_head // x.shape[1], dim=1)


def heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values, each [B, N, T, H], of [B, T, 3, N, H]."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


@accelerated("fused_attention.additive_mask")
def additive_mask(allowed: Tensor) -> Tensor:
    """Return a float32 bias: 0 where `allowed` is True, -inf elsewhere."""
    return torch.where(allowed, 0.0, -torch.inf)


def causal(length: int, device: torch.device) -> Tensor:
    """Return [T, T] bool: query t may see key s where s <= t.

    Example:
        >>> causal(2, torch.device("cpu"))
        tensor([[ True, False],
                [ True,  True]])
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
