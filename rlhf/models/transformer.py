"""Passes of transformer decoders around their blocks: whole sequences, prompts into a cache, one token at a time.

A family defines its blocks (`Transformer`) and binds these functions to them. The blocks receive a function for
attention: over packed rows, over prompts, or over a key-value cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.checks import check_integer, check_rank, check_same_shape, check_value
from rlhf.field_docs import documented
from rlhf.models.attention import (
    KVCache,
    attention_layout,
    decode_attention,
    init_kv_cache,
    prompt_attention,
    self_attention,
    write_prompts,
)
from rlhf.models.layers import dropout
from rlhf.random import fold_in
from rlhf.remat import remat
from rlhf.types import Params

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries [B, N, T, H], keys [B, G, T, H], values [B, G, T, H]) -> attended values [B, N, T, H]."""
Drop = Callable[[Tensor, int], Tensor]
"""(x, site) -> x with dropout, applied to whatever enters the residual stream."""


@documented
class Transformer(NamedTuple):
    """A family of transformer decoders."""

    blocks: Callable[..., Tensor]
    """(params, tokens [B, T], positions [B, T] or [T], config, attend, drop, *, gradient_checkpointing) -> [B, T, D]:
    hidden states after the final norm; `attend` is an `Attend`, `drop` a `Drop`."""
    final_norm: str
    """Name of the final norm among the parameters, whose weight has the device and dtype of the computation."""


def apply_layers(
    block: Callable[..., Tensor], x: Tensor, layers: Sequence[Params], *, gradient_checkpointing: bool = False
) -> Tensor:
    """Return the states after all layers.

    Args:
        block: function (x, params, *, layer) -> the states after the layer of this number.
        x: [B, T, D], the states before the first layer.
        layers: parameters of each layer.
        gradient_checkpointing: the backward pass recomputes each layer from its input (`rlhf.remat.remat`).

    Example:
        >>> add = lambda x, p, *, layer: x + layer * p
        >>> apply_layers(add, torch.zeros(1), [torch.ones(1), torch.ones(1), torch.ones(1)])
        tensor([3.])
    """
    for layer, params in enumerate(layers):
        step = functools.partial(block, layer=layer)
        x = (remat(step) if gradient_checkpointing else step)(x, params)
    return x


def hidden_states(
    family: Transformer,
    params: Params,
    tokens: Tensor,
    *,
    config: Any,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    bounds: Tensor | None = None,
    dropout_rate: float = 0.0,
    key: Tensor | None = None,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Return the hidden states after the final norm.

    Args:
        family: of the decoder; bound by the module of each family.
        params: its parameters.
        tokens: [B, T] int64 in [0, V).
        config: the shape of `params`.
        positions: [B, T] int64 in [0, n_positions); None is 0..T-1 in every row.
        segments: [B, T] int64, equal for tokens that may see each other; None is one segment per row. This one rule
            serves left padding, right padding (a segment of its own) and several sequences packed in a row.
        bounds: [S + 1] int32, where each segment starts (`rlhf.batches.Rows.bounds`), if every segment is contiguous;
            with them attention is faster on a GPU.
        dropout_rate: fraction dropped after the embedding, each attention and each MLP, as GPT-2's `resid_pdrop` and
            `embd_pdrop` (attention weights are not dropped); 0 except in SFT.
        key: [2] int32, consumed; needed where dropout_rate is not 0.
        gradient_checkpointing: the backward pass recomputes each block from its input (`rlhf.remat.remat`).

    Returns:
        [B, T, D] in the parameters' dtype.

    Raises:
        ValueError: shapes do not match, T exceeds n_positions without positions, bounds come without segments, or
            dropout without a key.
        TypeError: tokens are not int64.
    """
    check_integer("hidden_states", tokens=tokens)
    check_rank("hidden_states", 2, tokens=tokens)
    check_value("hidden_states", bounds is None or segments is not None, "given with bounds", segments=segments)
    length, limit = tokens.shape[1], config.n_positions
    if positions is None:
        check_value("hidden_states", length <= limit, f"at most n_positions = {limit}", length=length)
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    segments_like = tokens if segments is None else segments
    check_same_shape("hidden_states", tokens=tokens, positions=positions, segments=segments_like)
    check_value("hidden_states", (dropout_rate >= 0) & (dropout_rate < 1), "in [0, 1)", dropout_rate=dropout_rate)
    check_value("hidden_states", dropout_rate == 0 or key is not None, "given when dropout_rate is not 0", key=key)
    layout = attention_layout(segments, bounds, params[family.final_norm]["weight"], config.head_width)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self_attention(q, k, v, layout)

    def drop(x: Tensor, site: int) -> Tensor:
        return x if key is None or dropout_rate == 0 else dropout(x, dropout_rate, key=fold_in(key, site))

    return family.blocks(params, tokens, positions, config, attend, drop, gradient_checkpointing=gradient_checkpointing)


def init_cache(family: Transformer, params: Params, batch_size: int, slots: int, *, config: Any) -> KVCache:
    """Return an empty cache for `batch_size` sequences of up to `slots` tokens, with the blocks' dtype and device."""
    like = params[family.final_norm]["weight"]
    return init_kv_cache(
        like,
        n_layer=config.n_layer,
        batch_size=batch_size,
        n_kv_head=config.kv_heads,
        slots=slots,
        width=config.head_width,
    )


def prefill(
    family: Transformer,
    params: Params,
    tokens: Tensor,
    lengths: Tensor,
    cache: KVCache,
    *,
    config: Any,
    rows: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """Read whole prompts into the first P slots of cache rows; return the states that predict their next tokens.

    Args:
        family: of the decoder.
        params: its parameters.
        tokens: [U, P] int64, right-padded with any valid token. What padding writes is overwritten by `decode`
            before it is ever attended to.
        lengths: [U] int64, real tokens per prompt, at least 1.
        cache: written in place.
        config: the shape of `params`.
        rows: [R] int64, the cache rows to fill; None is the first U.
        source: [R] int64, the prompt of each of these rows, so that several may share one; None is 0..U-1.

    Returns:
        [R, D]: the hidden state of each row's last real token, which predicts its first completion token.

    Raises:
        ValueError: the prompts exceed the cache or n_positions.
    """
    count, width = tokens.shape
    limit = min(cache.values[0].shape[2], config.n_positions)
    check_value("prefill", width <= limit, f"at most {limit}", width=width)
    every = torch.arange(count, device=tokens.device)
    rows, source = every if rows is None else rows, every if source is None else source

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write_prompts(cache, layer, k, v, rows, source)
        return prompt_attention(q, k, v)

    hidden_UTD = family.blocks(params, tokens, torch.arange(width, device=tokens.device), config, attend, _keep)
    return hidden_UTD[every, lengths - 1][source]


def decode(
    family: Transformer,
    params: Params,
    tokens: Tensor,
    lengths: Tensor,
    cache: KVCache,
    *,
    config: Any,
    cache_length: int,
) -> Tensor:
    """Read one more token per row; return the states that predict the tokens after these.

    Args:
        family: of the decoder.
        params: its parameters.
        tokens: [B] int64, the next token of each row.
        lengths: [B] int64, tokens already in the cache: the position of this one.
        cache: written in place at slot `lengths`.
        config: the shape of `params`.
        cache_length: slots to attend over, greater than every element of `lengths`.

    Returns:
        [B, D].
    """
    unseen = torch.arange(cache_length, device=tokens.device) > lengths[:, None]
    bias_BU = torch.where(unseen, -torch.inf, 0.0)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[:, :, 0] for x in (q, k, v))
        return decode_attention(q, k, v, cache.keys[layer], cache.values[layer], lengths, bias_BU)[:, :, None]

    return family.blocks(params, tokens[:, None], lengths[:, None], config, attend, _keep)[:, 0]


def _keep(x: Tensor, site: int) -> Tensor:
    return x
