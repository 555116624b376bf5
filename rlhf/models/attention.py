"""Attention over packed rows, over prompts, and of one query per row over a key-value cache.

A bias is added to the scores: 0 where a query may see a key, and -inf elsewhere. Softmax is computed in float32
or wider.

N query heads share G key-value heads: query head n reads head n // (N / G). G equals N if nothing is shared.

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
    """[B, 1, T, T] float32 bias; None if every row is one sequence, or if `bounds` replace it."""
    bounds: Tensor | None
    """[S + 1] int32 start of each segment, if a kernel reads them (`rlhf.batches.Rows.bounds`) instead of the bias."""


@documented
class KVCache(NamedTuple):
    """The keys and values of the tokens seen so far, one tensor per layer, which are written in place."""

    keys: tuple[Tensor, ...]
    """[B, G, H, S] keys of each layer."""
    values: tuple[Tensor, ...]
    """[B, G, S, H] values of each layer."""


@accelerated("fused_attention.attention_layout")
def attention_layout(segments: Tensor | None, bounds: Tensor | None, like: Tensor, width: int) -> AttentionLayout:
    """Return the layout in which each token sees itself and the earlier tokens of its segment.

    Args:
        segments: [B, T] int64, equal for tokens that may see each other. None stands for one segment per row.
        bounds: [S + 1] int32 start of each segment, if every segment is contiguous. Only kernels read them.
        like: any tensor with the device and dtype of the hidden states.
        width: width H of a head.

    Example:
        >>> attention_layout(torch.tensor([[0, 1]]), None, torch.zeros(1), 4).bias
        tensor([[[[0., -inf],
                  [-inf, 0.]]]])
    """
    if segments is None:
        return AttentionLayout(None, None)
    allowed = causal(segments.shape[1], segments.device) & (segments[:, :, None] == segments[:, None, :])
    return AttentionLayout(additive_mask(allowed[:, None]), None)


@accelerated("fused_attention.self_attention")
def self_attention(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """Return self-attention over packed rows.

    Args:
        q: [B, N, T, H] queries; differentiated.
        k: [B, G, T, H] keys; differentiated.
        v: [B, G, T, H] values; differentiated.
        layout: result of `attention_layout`.

    Returns:
        [B, N, T, H] in the dtype of q.

    Example:
        >>> q, v = torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        >>> self_attention(q, q, v, attention_layout(torch.tensor([[0, 1]]), None, q, 1)).flatten()
        tensor([1., 3.])
    """
    return attention(q, k, v, layout.bias)


@accelerated("fused_attention.attention")
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k' / sqrt(H) + bias) v.

    Source: Vaswani et al. 2017, eq. 1, https://arxiv.org/abs/1706.03762.

    Args:
        q: [B, N, T, H] queries; differentiated.
        k: [B, G, T, H] keys; differentiated.
        v: [B, G, T, H] values; differentiated.
        bias: tensor that broadcasts to [B, 1, T, T]; every query has a key with a finite bias. None stands for the
            causal bias.

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
    """Return the causal `attention` of prompts, one per row.

    Args:
        q: [B, N, T, H] queries; not differentiated.
        k: [B, G, T, H] keys; not differentiated.
        v: [B, G, T, H] values; not differentiated.

    Returns:
        [B, N, T, H] in the dtype of q.

    Example:
        >>> q, v = torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        >>> prompt_attention(q, q, v).flatten()
        tensor([1., 2.])
    """
    return attention(q, k, v, None)


@accelerated("fused_attention.init_kv_cache")
def init_kv_cache(like: Tensor, *, n_layer: int, batch_size: int, n_kv_head: int, slots: int, width: int) -> KVCache:
    """Return an empty cache for `batch_size` sequences of up to `slots` tokens.

    Args:
        like: any tensor with the dtype and device of the cache.
        n_layer: number of layers.
        batch_size: number of sequences B.
        n_kv_head: number of key-value heads G.
        slots: number of tokens S that each sequence may have.
        width: width H of a head.

    Example:
        >>> cache = init_kv_cache(torch.zeros(1), n_layer=3, batch_size=2, n_kv_head=1, slots=8, width=4)
        >>> len(cache.values), cache.values[0].shape
        (3, torch.Size([2, 1, 8, 4]))
    """
    keys = [like.new_zeros(batch_size, n_kv_head, width, slots) for _ in range(n_layer)]
    return KVCache(tuple(keys), tuple(like.new_zeros(batch_size, n_kv_head, slots, width) for _ in keys))


def write_prompts(cache: KVCache, layer: int, k: Tensor, v: Tensor, rows: Tensor, source: Tensor) -> None:
    """Write the keys and values of prompts into the first P slots of cache rows.

    Args:
        cache: cache, which is written in place.
        layer: index of the layer.
        k: [U, G, P, H] keys.
        v: [U, G, P, H] values.
        rows: [R] int64 rows of the cache.
        source: [R] int64 prompt of each of these rows.

    Example:
        >>> cache = init_kv_cache(torch.zeros(1), n_layer=1, batch_size=3, n_kv_head=1, slots=2, width=1)
        >>> k = v = torch.ones(1, 1, 1, 1)
        >>> write_prompts(cache, 0, k, v, rows=torch.tensor([0, 2]), source=torch.tensor([0, 0]))
        >>> cache.values[0].flatten(1)
        tensor([[1., 0.],
                [0., 0.],
                [1., 0.]])
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
        q: [B, N, H] queries of the new tokens.
        k: [B, G, H] keys of the new tokens.
        v: [B, G, H] values of the new tokens.
        keys: [B, G, H, S] keys of a layer's cache, which are written in place at slot `lengths`.
        values: [B, G, S, H] values of a layer's cache, which are written in place at slot `lengths`.
        lengths: [B] int64 number of tokens in the cache before the new one.
        bias: [B, U] float32 over the first U slots: 0 up to slot `lengths`, and -inf after it.

    Returns:
        [B, N, H] in the dtype of q.

    Example:
        >>> keys, values = torch.zeros(1, 1, 1, 4), torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 4, 1)
        >>> q, v, bias = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3.0), torch.zeros(1, 2)
        >>> decode_attention(q, q, v, keys, values, torch.tensor([1]), bias)
        tensor([[[2.]]])
    """
    rows, length = torch.arange(len(q), device=q.device), bias.shape[1]
    keys[rows, :, :, lengths] = k
    values[rows, :, lengths] = v
    return attend_to_cache(q, keys[..., :length], values[:, :, :length], bias)


@accelerated("fused_attention.attend_to_cache")
def attend_to_cache(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q K / sqrt(H) + bias) V of one query per row.

    Args:
        q: [B, N, H] queries.
        keys: [B, G, H, U] keys in the cache.
        values: [B, G, U, H] values in the cache.
        bias: [B, U] float32; every row has a slot with a finite bias.

    Returns:
        [B, N, H] in the dtype of q.

    Example:
        >>> q, values = torch.zeros(1, 1, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        >>> attend_to_cache(q, torch.zeros(1, 1, 1, 2), values, torch.tensor([[0.0, -torch.inf]]))
        tensor([[[1.]]])
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])  # [B, G, N / G, H]
    scores = grouped.to(wide) @ keys.to(wide)  # bf16 is slow here
    weights = (scores * q.shape[-1] ** -0.5 + bias[:, None, None]).softmax(-1)
    return (weights @ values.to(wide)).flatten(1, 2).to(q.dtype)


def repeat_heads(x: Tensor, n_head: int) -> Tensor:
    """Return the keys or values [B, N, T, H] that each query head reads, given those of the key-value heads.

    Args:
        x: [B, G, T, H] keys or values.
        n_head: number of query heads N, a multiple of G.

    Example:
        >>> repeat_heads(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), 4).flatten()
        tensor([1., 1., 2., 2.])
    """
    return x if x.shape[1] == n_head else x.repeat_interleave(n_head // x.shape[1], dim=1)


def heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values, each [B, N, T, H].

    Args:
        qkv: [B, T, 3, N, H] queries, keys and values.

    Example:
        >>> q, k, v = heads_first(torch.arange(3).view(1, 1, 3, 1, 1))
        >>> v
        tensor([[[[2]]]])
    """
    return qkv.permute(2, 0, 3, 1, 4).unbind()


@accelerated("fused_attention.additive_mask")
def additive_mask(allowed: Tensor) -> Tensor:
    """Return a float32 bias: 0 where `allowed` is True, and -inf elsewhere.

    Example:
        >>> additive_mask(torch.tensor([True, False]))
        tensor([0., -inf])
    """
    return torch.where(allowed, 0.0, -torch.inf)


def causal(length: int, device: torch.device) -> Tensor:
    """Return the causal mask [T, T] bool: query t may see key s if s <= t.

    Args:
        length: number of tokens T.
        device: device of the result.

    Example:
        >>> causal(2, torch.device("cpu"))
        tensor([[ True, False],
                [ True,  True]])
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()
