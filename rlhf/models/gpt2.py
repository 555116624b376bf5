"""GPT-2: whole sequences, prompts into a key-value cache, and one token at a time.

`rlhf.models.gpt2_parameters` describes the parameters. Computation runs in their dtype.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", https://github.com/openai/gpt-2;
outputs equal `transformers.GPT2LMHeadModel`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.checks import check_integer, check_rank, check_same_shape, check_value
from rlhf.models.architecture import Architecture
from rlhf.models.attention import (
    KVCache,
    attention_layout,
    decode_attention,
    heads_first,
    init_kv_cache,
    prompt_attention,
    self_attention,
    write_prompts,
)
from rlhf.models.gpt2_config import PRESETS, GPT2Config, settings_to_shape, shape_to_settings
from rlhf.models.gpt2_parameters import (
    MASK_BUFFERS,
    cast_for_compute,
    empty,
    from_hugging_face,
    init,
    prepare_for_decoding,
    select_vocab,
    to_hugging_face,
    unembedding,
)
from rlhf.models.layers import affine, dropout, gelu, layer_norm, unembed
from rlhf.ops import gather_rows
from rlhf.random import fold_in
from rlhf.remat import remat
from rlhf.types import Params


def hidden_states(
    params: Params,
    tokens: Tensor,
    *,
    config: GPT2Config,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    bounds: Tensor | None = None,
    dropout_rate: float = 0.0,
    key: Tensor | None = None,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Return the hidden states after the final layer norm.

    Args:
        params: GPT-2 parameters.
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
    layout = attention_layout(segments, bounds, params["ln_f"]["weight"], config.n_head)

    def drop(x: Tensor, site: int) -> Tensor:
        return x if key is None or dropout_rate == 0 else dropout(x, dropout_rate, key=fold_in(key, site))

    return _blocks(
        params,
        _embed(params, tokens, positions),
        config,
        lambda layer, qkv: self_attention(qkv, layout),
        drop,
        gradient_checkpointing=gradient_checkpointing,
    )


def logits(params: Params, hidden: Tensor, *, config: GPT2Config, padded: bool = False) -> Tensor:
    """Return logits [..., V] of hidden states [..., D] in their dtype, through the embedding (tied weights).

    Args:
        params: GPT-2 parameters, or their `unembedding`.
        hidden: hidden states.
        config: the shape of `params`.
        padded: as in `rlhf.models.layers.unembed`.
    """
    return unembed(hidden, params["wte"], vocab_size=config.vocab_size, padded=padded)


def init_cache(params: Params, batch_size: int, slots: int, *, config: GPT2Config) -> KVCache:
    """Return an empty cache for `batch_size` sequences of up to `slots` tokens, with the blocks' dtype and device."""
    width = config.n_embd // config.n_head
    like = params["ln_f"]["weight"]
    return init_kv_cache(
        like, n_layer=len(params["h"]), batch_size=batch_size, n_head=config.n_head, slots=slots, width=width
    )


def prefill(
    params: Params,
    tokens: Tensor,
    lengths: Tensor,
    cache: KVCache,
    *,
    config: GPT2Config,
    rows: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """Read whole prompts into the first P slots of cache rows; return the states that predict their next tokens.

    Args:
        params: GPT-2 parameters.
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

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        write_prompts(cache, layer, k, v, rows, source)
        return prompt_attention(q, k, v)

    hidden_UTD = _blocks(params, _embed(params, tokens, torch.arange(width, device=tokens.device)), config, attend)
    return hidden_UTD[every, lengths - 1][source]


def decode(
    params: Params, tokens: Tensor, lengths: Tensor, cache: KVCache, *, config: GPT2Config, cache_length: int
) -> Tensor:
    """Read one more token per row; return the states that predict the tokens after these.

    Args:
        params: GPT-2 parameters.
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

    def attend(layer: int, qkv: Tensor) -> Tensor:
        attended = decode_attention(qkv[:, 0], cache.keys[layer], cache.values[layer], lengths, bias_BU)
        return attended[:, :, None]

    return _blocks(params, _embed(params, tokens[:, None], lengths[:, None]), config, attend)[:, 0]


def _embed(params: Params, tokens: Tensor, positions: Tensor) -> Tensor:
    """Return the sum of the two embeddings in the dtype of the blocks; the tables may have a wider one."""
    embedded = gather_rows(params["wte"]["weight"], tokens) + gather_rows(params["wpe"]["weight"], positions)
    return embedded.to(params["ln_f"]["weight"].dtype)


def _blocks(
    params: Params,
    x: Tensor,
    config: GPT2Config,
    attend: Callable[[int, Tensor], Tensor],
    drop: Callable[[Tensor, int], Tensor] = lambda x, site: x,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Return the final norm of embedded tokens [B, T, D] after all blocks.

    Args:
        params: GPT-2 parameters.
        x: embedded tokens.
        config: the shape of `params`.
        attend: (layer, queries, keys and values [B, T, 3, N, H]) -> attended values [B, N, T, H].
        drop: (x, site) -> x with dropout, applied to whatever enters the residual stream.
        gradient_checkpointing: as in `hidden_states`.
    """
    eps = config.layer_norm_epsilon

    def block(x: Tensor, p: Params, *, layer: int) -> Tensor:
        qkv = affine(layer_norm(x, p["ln_1"], eps=eps), p["attn"]["c_attn"]).view(*x.shape[:2], 3, config.n_head, -1)
        attended_BTD = attend(layer, qkv).transpose(1, 2).reshape(x.shape)
        x = x + drop(affine(attended_BTD, p["attn"]["c_proj"]), 2 * layer + 1)
        expanded = gelu(affine(layer_norm(x, p["ln_2"], eps=eps), p["mlp"]["c_fc"]))
        return x + drop(affine(expanded, p["mlp"]["c_proj"]), 2 * layer + 2)

    x = drop(x, 0)
    for layer, p in enumerate(params["h"]):
        step = functools.partial(block, layer=layer)
        x = (remat(step) if gradient_checkpointing else step)(x, p)
    return layer_norm(x, params["ln_f"], eps=eps)


ARCHITECTURE = Architecture(
    shape=GPT2Config,
    presets=PRESETS,
    init=init,
    empty=empty,
    hidden_states=hidden_states,
    logits=logits,
    unembedding=unembedding,
    cast_for_compute=cast_for_compute,
    prepare_for_decoding=prepare_for_decoding,
    init_cache=init_cache,
    prefill=prefill,
    decode=decode,
    select_vocab=select_vocab,
    to_hugging_face=to_hugging_face,
    from_hugging_face=from_hugging_face,
    settings_to_shape=settings_to_shape,
    shape_to_settings=shape_to_settings,
    causal_lm="GPT2LMHeadModel",
    sequence_classifier="GPT2ForSequenceClassification",
    aliases=frozenset({"GPT2Model"}),
    prefix="transformer.",
    embedding="wte.weight",
    ignored_suffixes=MASK_BUFFERS,
)
