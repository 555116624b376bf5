"""Passes of transformer decoders: over whole sequences, over prompts into a cache, and over one token at a time.

A family defines its blocks (`Transformer`), and its module binds these functions to them. Each pass gives the blocks
the function that attends: over packed rows, over prompts, or over a key-value cache. The examples call the functions
that `rlhf.gpt2` has bound.
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
"""(x, site) -> x with dropout, which is applied to everything that enters the residual stream."""


@documented
class Transformer(NamedTuple):
    """The blocks of a family of transformer decoders, around which the passes are the same for all."""

    blocks: Callable[..., Tensor]
    """(params, tokens [B, T], positions [B, T] or [T], config, attend, drop, *, gradient_checkpointing) -> [B, T, D]:
    hidden states after the final norm, computed with an `Attend` and a `Drop`."""
    final_norm: str
    """Name of the final norm among the parameters. Its weight has the device and dtype of the computation."""


def apply_layers(
    block: Callable[..., Tensor], x: Tensor, layers: Sequence[Params], *, gradient_checkpointing: bool = False
) -> Tensor:
    """Return the states after all layers.

    Args:
        block: function (x, params, *, layer) -> the states after the layer of this number.
        x: [B, T, D] states before the first layer.
        layers: parameters of each layer.
        gradient_checkpointing: True to recompute each layer from its input in the backward pass (`rlhf.remat.remat`).

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
        family: the decoder's family, which its module binds.
        params: parameters of the decoder.
        tokens: [B, T] int64 in [0, V).
        config: shape of `params`.
        positions: [B, T] int64 in [0, n_positions). None stands for 0..T-1 in every row.
        segments: [B, T] int64, equal for tokens that may see each other. None stands for one segment per row. This one
            rule serves left padding, right padding (a segment of its own) and several sequences packed in a row.
        bounds: [S + 1] int32 start of each segment (`rlhf.batches.Rows.bounds`), if every segment is contiguous.
            Attention is faster with them on a GPU.
        dropout_rate: fraction that is dropped after the embedding, each attention and each MLP, like GPT-2's
            `resid_pdrop` and `embd_pdrop`; attention weights are not dropped. It is 0 except in SFT.
        key: [2] int32 key, which is consumed. It is required if dropout_rate is not 0.
        gradient_checkpointing: True to recompute each block from its input in the backward pass (`rlhf.remat.remat`).

    Returns:
        [B, T, D] hidden states in the parameters' dtype.

    Raises:
        ValueError: shapes do not match, T exceeds n_positions without positions, bounds come without segments, or
            dropout without a key.
        TypeError: tokens are not int64.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> rlhf.gpt2.hidden_states(params, torch.tensor([[1, 2, 3]]), config=config).shape
        torch.Size([1, 3, 4])
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
    """Return an empty cache for `batch_size` sequences of up to `slots` tokens.

    Args:
        family: the decoder's family, which its module binds.
        params: parameters of the decoder, whose dtype and device the cache gets.
        batch_size: number of sequences.
        slots: number of tokens that each sequence may have.
        config: shape of `params`.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> rlhf.gpt2.init_cache(params, 2, 8, config=config).keys[0].shape
        torch.Size([2, 1, 4, 8])
    """
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
    """Write the keys and values of whole prompts into the first P slots of cache rows, and return their last states.

    Args:
        family: the decoder's family, which its module binds.
        params: parameters of the decoder.
        tokens: [U, P] int64, right-padded with any valid token. `decode` overwrites what padding writes before anything
            attends to it.
        lengths: [U] int64 number of tokens of each prompt, at least 1.
        cache: cache, which is written in place.
        config: shape of `params`.
        rows: [R] int64 cache rows to fill. None stands for the first U.
        source: [R] int64 prompt of each of these rows; several rows may share a prompt. None stands for 0..U-1.

    Returns:
        [R, D] hidden state of each row's last prompt token, which predicts the first completion token.

    Raises:
        ValueError: the prompts exceed the cache or n_positions.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> cache, prompts = rlhf.gpt2.init_cache(params, 2, 8, config=config), torch.tensor([[1, 2], [3, 0]])
        >>> rlhf.gpt2.prefill(params, prompts, torch.tensor([2, 1]), cache, config=config).shape
        torch.Size([2, 4])
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
    """Write the keys and values of one more token per row into the cache, and return the states of these tokens.

    Args:
        family: the decoder's family, which its module binds.
        params: parameters of the decoder.
        tokens: [B] int64 next token of each row.
        lengths: [B] int64 number of tokens in the cache before this one, which is its position.
        cache: cache, which is written in place at slot `lengths`.
        config: shape of `params`.
        cache_length: number of slots to attend to, greater than every element of `lengths`.

    Returns:
        [B, D] hidden states, which predict the tokens after these.

    Example:
        >>> config = rlhf.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
        >>> params = rlhf.gpt2.init(config, key=rlhf.random.key(0))
        >>> cache, lengths = rlhf.gpt2.init_cache(params, 2, 8, config=config), torch.tensor([0, 0])
        >>> rlhf.gpt2.decode(params, torch.tensor([1, 2]), lengths, cache, config=config, cache_length=1).shape
        torch.Size([2, 4])
    """
    unseen = torch.arange(cache_length, device=tokens.device) > lengths[:, None]
    bias_BU = torch.where(unseen, -torch.inf, 0.0)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[:, :, 0] for x in (q, k, v))
        return decode_attention(q, k, v, cache.keys[layer], cache.values[layer], lengths, bias_BU)[:, :, None]

    return family.blocks(params, tokens[:, None], lengths[:, None], config, attend, _keep)[:, 0]


def _keep(x: Tensor, site: int) -> Tensor:
    return x
