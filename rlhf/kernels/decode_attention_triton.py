"""Attention of single queries over a key-value cache as a Triton kernel, for GPUs; Triton comes with torch there."""

import triton
import triton.language as tl
from torch import Tensor, contiguous_format, empty_like

_BLOCK, _WARPS = 32, 1
"""Slots that a program reads at a time, and its warps: 86% of a copy's bandwidth on an H200 at 512 rows."""


def decode_attention_triton(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention of one new token per row, and write its key and value into the cache in place.

    The softmax's maximum and sum are updated slot by slot, so keys and values are read once, and unused slots are not
    read.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867.

    Args:
        q: [B, N, H] float, queries of the new tokens, on a GPU.
        k: [B, G, H] float, keys of the new tokens, each shared by N / G query heads.
        v: [B, G, H] float, values of the new tokens.
        keys: [B, G, H, S] float, cached keys, in memory as [B, S, G, H] (`rlhf.models.attention.init_kv_cache`).
        values: [B, G, S, H] float, cached values, in memory as [B, S, G, H].
        lengths: [B] int64 below S, number of slots in use, which is also the slot of the new token.

    Returns:
        [B, N, H] in the dtype of q.
    """
    rows, heads, width = q.shape
    q, k, v = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v))  # rows may lie apart
    out = empty_like(q, memory_format=contiguous_format)
    _attend[(heads, rows)](
        q, k, v, keys, values, out, lengths, q.stride(0), k.stride(0), v.stride(0), keys.shape[3], heads=heads,
        shared=heads // k.shape[1], width=width, padded=triton.next_power_of_2(width), block=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    q,
    k,
    v,
    keys,
    values,
    out,
    lengths,
    q_stride,
    k_stride,
    v_stride,
    slots,
    heads: tl.constexpr,
    shared: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
):
    """Attend with one query head of one row, in float32. The heads of a row run side by side.

    Heads that share a key and a value all write the same bytes.
    """
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    component, slot = tl.arange(0, padded), tl.arange(0, block)
    real = component < width
    layer: tl.constexpr = heads // shared * width
    own = (head // shared) * width + component
    asked = head * width + component
    query = tl.load(q + row * q_stride + asked, mask=real, other=0.0).to(tl.float32) * (width**-0.5)
    key = tl.load(k + row * k_stride + own, mask=real, other=0.0)
    value = tl.load(v + row * v_stride + own, mask=real, other=0.0)
    count = tl.load(lengths + row).to(tl.int32)
    begin = row * slots * layer + own  # known multiples: loads of 16 bytes
    tl.store(keys + begin + count * layer, key, mask=real)
    tl.store(values + begin + count * layer, value, mask=real)
    best, total, attended = tl.sum(key.to(tl.float32) * query, 0), 1.0, value.to(tl.float32)
    for first in range(0, count, block):
        live = first + slot < count
        place = begin[None, :] + (first + slot)[:, None] * layer
        there = live[:, None] & real[None, :]
        past_key = tl.load(keys + place, mask=there, other=0.0).to(tl.float32)
        past_value = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(live, tl.sum(past_key * query[None, :], 1), float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 0))
        weights, shrink = tl.exp(scores - highest), tl.exp(best - highest)
        attended = attended * shrink + tl.sum(weights[:, None] * past_value, 0)
        total = total * shrink + tl.sum(weights, 0)
        best = highest
    tl.store(out + row * (heads * width) + asked, (attended / total).to(out.dtype.element_ty), mask=real)
