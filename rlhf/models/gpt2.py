"""GPT-2 as pure functions over a pytree of parameters.

Parameters are nested dicts and lists under OpenAI's names, so that a leaf's dotted name is its Hugging Face name
without the `transformer.` prefix:

    wte.weight [V, D]   wpe.weight [T, D]   ln_f.{weight,bias} [D]   and for each layer h.i:
    ln_1, ln_2 {weight,bias} [D]
    attn.c_attn {weight [D, 3D], bias [3D]}   attn.c_proj {weight [D, D], bias [D]}
    mlp.c_fc {weight [D, 4D], bias [4D]}      mlp.c_proj {weight [4D, D], bias [D]}

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", https://github.com/openai/gpt-2;
outputs equal `transformers.GPT2LMHeadModel`. Computation runs in the dtype of the parameters.
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
from rlhf.models.hugging_face import strip_prefix, take_leaves
from rlhf.models.layers import affine, dropout, gelu, layer_norm, pack_affine, pack_embedding, unembed
from rlhf.ops import gather_rows
from rlhf.random import fold_in, normal
from rlhf.remat import remat
from rlhf.tree import cast, named_leaves, tree_map_named
from rlhf.types import Params

_INIT_STD = 0.02
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Suffixes of the causal mask's buffers, which older versions of transformers saved."""


def init(config: GPT2Config, *, key: Tensor) -> Params:
    """Return random parameters: normal with std 0.02, projections into the residual stream with 0.02 / sqrt(2L).

    Source: Radford et al. 2019, section 2.3 ("scale the weights of residual layers at initialization by 1/sqrt(N)").

    Args:
        config: the shape.
        key: [2] int32, consumed.

    Returns:
        float32 parameters.
    """
    structure = empty(config)
    keys = {name: fold_in(key, index) for index, name in enumerate(named_leaves(structure))}

    def leaf(name: str, like: Tensor) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(like.shape)
        if "ln_" in name:
            return torch.ones(like.shape)
        std = _INIT_STD / (2 * config.n_layer) ** 0.5 if "c_proj" in name else _INIT_STD
        return std * normal(keys[name], tuple(like.shape))

    params: Params = tree_map_named(leaf, structure)
    return params


def empty(config: GPT2Config) -> Params:
    """Return the parameters' structure and shapes without memory: tensors on the `meta` device."""
    width = config.n_embd

    def affine(*shape: int) -> Params:
        return {"weight": torch.empty(shape, device="meta"), "bias": torch.empty(shape[-1], device="meta")}

    def block() -> Params:
        return {
            "ln_1": affine(width),
            "attn": {"c_attn": affine(width, 3 * width), "c_proj": affine(width, width)},
            "ln_2": affine(width),
            "mlp": {"c_fc": affine(width, 4 * width), "c_proj": affine(4 * width, width)},
        }

    return {
        "wte": {"weight": torch.empty(config.vocab_size, width, device="meta")},
        "wpe": {"weight": torch.empty(config.n_positions, width, device="meta")},
        "h": [block() for _ in range(config.n_layer)],
        "ln_f": affine(width),
    }


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
        bounds: [S + 1] int32, where segments lie, if each is in one piece (`rlhf.batches.Rows.bounds`); on a GPU
            attention is faster with them.
        dropout_rate: share dropped after the embedding, each attention and each MLP, as GPT-2's `resid_pdrop` and
            `embd_pdrop` (attention weights are not dropped); 0 outside of SFT.
        key: [2] int32, consumed; needed where dropout_rate is not 0.
        gradient_checkpointing: the backward pass computes each block again from its input (`rlhf.remat.remat`).

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

    def drop(x: Tensor, place: int) -> Tensor:
        return x if key is None or dropout_rate == 0 else dropout(x, dropout_rate, key=fold_in(key, place))

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
        padded: of `rlhf.models.layers.unembed`.
    """
    return unembed(hidden, params["wte"], vocab_size=config.vocab_size, padded=padded)


def unembedding(params: Params) -> Params:
    """Return the part of the parameters that `logits` reads."""
    return {"wte": params["wte"]}


def cast_for_compute(params: Params, dtype: torch.dtype) -> Params:
    """Return parameters to compute with in `dtype`; the embeddings stay as they are, and are rounded after the look-up.

    So an embedding's gradient adds up in the master weights' dtype: a row that occurs a hundred times in a batch would
    lose most of its gradient in bfloat16.
    """
    return cast(params, dtype) | {"wte": params["wte"], "wpe": params["wpe"]}


def prepare_for_decoding(params: Params, dtype: torch.dtype) -> Params:
    """Return parameters to read single tokens with, all in `dtype`: without gradients embeddings may be rounded too."""

    def block(p: Params) -> Params:
        packed = {part: {name: pack_affine(cast(p[part][name], dtype)) for name in p[part]} for part in ("attn", "mlp")}
        return {"ln_1": cast(p["ln_1"], dtype), "ln_2": cast(p["ln_2"], dtype)} | packed

    wte, wpe, ln_f = (cast(params[name], dtype) for name in ("wte", "wpe", "ln_f"))
    return {"wte": pack_embedding(wte), "wpe": wpe, "h": [block(p) for p in params["h"]], "ln_f": ln_f}


def init_cache(params: Params, batch_size: int, slots: int, *, config: GPT2Config) -> KVCache:
    """Return an empty cache for `batch_size` sequences of up to `slots` tokens, of the blocks' dtype and device."""
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
    """Read whole prompts, filling the first P slots of cache rows; return the states that predict what follows.

    Args:
        params: GPT-2 parameters.
        tokens: [U, P] int64, right-padded with any valid token. What padding writes is overwritten by `decode`
            before it is ever attended to.
        lengths: [U] int64, real tokens per prompt, at least 1.
        cache: written in place.
        config: the shape of `params`.
        rows: [R] int64, the cache's rows that are filled; None is the first U.
        source: [R] int64, the prompt that each of them gets, so that several may share one; None is 0..U-1.

    Returns:
        [R, D]: the hidden state of each row's last real token, which predicts its first completion token.

    Raises:
        ValueError: the prompts exceed the cache or n_positions.
    """
    count, width = tokens.shape
    limit = min(cache.values[0].shape[2], config.n_positions)
    check_value("prefill", width <= limit, f"at most {limit}", width=width)
    each = torch.arange(count, device=tokens.device)
    filled, prompt = each if rows is None else rows, each if source is None else source

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = heads_first(qkv)
        write_prompts(cache, layer, k, v, filled, prompt)
        return prompt_attention(q, k, v)

    hidden_UTD = _blocks(params, _embed(params, tokens, torch.arange(width, device=tokens.device)), config, attend)
    return hidden_UTD[each, lengths - 1][prompt]


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
        cache_length: slots to attend over, above every element of `lengths`: the filled part of the cache.

    Returns:
        [B, D].
    """
    unseen = torch.arange(cache_length, device=tokens.device) > lengths[:, None]
    bias_BU = torch.where(unseen, -torch.inf, 0.0)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        attended = decode_attention(qkv[:, 0], cache.keys[layer], cache.values[layer], lengths, bias_BU)
        return attended[:, :, None]

    return _blocks(params, _embed(params, tokens[:, None], lengths[:, None]), config, attend)[:, 0]


def select_vocab(params: Params, rows: int) -> Params:
    """Return the parameters with the first `rows` rows of the embedding."""
    return params | {"wte": {"weight": params["wte"]["weight"][:rows].clone()}}


def to_hugging_face(params: Params) -> dict[str, Tensor]:
    """Return the state dict of `transformers.GPT2LMHeadModel`, without the tied `lm_head.weight`."""
    return {f"transformer.{name}": leaf for name, leaf in named_leaves(params).items()}


def from_hugging_face(state: dict[str, Tensor], *, config: GPT2Config) -> Params:
    """Return parameters from a state dict of `GPT2Model`, `GPT2LMHeadModel` or `GPT2ForSequenceClassification`.

    Names with and without `transformer.` are taken; causal-mask buffers, `lm_head` and `score` are left aside.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """
    weights = {name: leaf for name, leaf in state.items() if not name.startswith(("lm_head.", "score."))}
    return take_leaves(empty(config), strip_prefix(weights, "transformer.", _MASKS))


def _embed(params: Params, tokens: Tensor, positions: Tensor) -> Tensor:
    """Return the sum of the two embeddings in the dtype of the blocks; the tables may be wider than it."""
    embedded = gather_rows(params["wte"]["weight"], tokens) + gather_rows(params["wpe"]["weight"], positions)
    return embedded.to(params["ln_f"]["weight"].dtype)


def _blocks(
    params: Params,
    x: Tensor,
    config: GPT2Config,
    attend: Callable[[int, Tensor], Tensor],
    drop: Callable[[Tensor, int], Tensor] = lambda x, place: x,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Return the final norm of embedded tokens [B, T, D] after all blocks.

    Args:
        params: GPT-2 parameters.
        x: embedded tokens.
        config: the shape of `params`.
        attend: (layer, [B, T, 3, N, H]) -> [B, N, T, H].
        drop: of what is added to the residual stream, by place.
        gradient_checkpointing: of `hidden_states`.
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
    ignored_suffixes=_MASKS,
)
