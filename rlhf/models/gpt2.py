"""GPT-2 as pure functions over a pytree of parameters.

Parameters are nested dicts and lists under OpenAI's names, so that a leaf's dotted name is its Hugging Face name
without the `transformer.` prefix:

    wte.weight [V, D]   wpe.weight [T, D]   ln_f.{weight,bias} [D]   and for each layer h.i:
    ln_1, ln_2 {weight,bias} [D]
    attn.c_attn {weight [D, 3D], bias [3D]}   attn.c_proj {weight [D, D], bias [D]}
    mlp.c_fc {weight [D, 4D], bias [4D]}      mlp.c_proj {weight [4D, D], bias [D]}

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", https://github.com/openai/gpt-2;
outputs equal `transformers.GPT2LMHeadModel`. Computation runs in the dtype of the parameters.

Sequences in a row are told apart by `segments`: a token attends to earlier tokens of its own segment. That one
rule serves left padding, right padding (padding is a segment of its own) and several sequences packed in a row.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.checks import check_integer, check_rank, check_same_shape, check_value
from rlhf.kernels.attention import attention, decode_attention, packed_attention, packs, segment_bias
from rlhf.kernels.products import mask_vocab_padding, pad_vocab, product
from rlhf.kernels.remat import remat
from rlhf.models.gpt2_config import GPT2Config
from rlhf.ops import gather_rows
from rlhf.random import fold_in, normal, uniform
from rlhf.tree import cast, named_leaves, tree_map_named, with_leaves
from rlhf.types import Params

_INIT_STD = 0.02
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def init(config: GPT2Config, *, key: Tensor) -> Params:
    """Random parameters as GPT-2's: normal with std 0.02, projections into the residual stream with 0.02 / sqrt(2L).

    Source: Radford et al. 2019, section 2.3 ("scale the weights of residual layers at initialization by 1/sqrt(N)").

    Args:
        config: the shape.
        key: [2] int32, consumed.

    Returns:
        float32 parameters.
    """
    blank = empty(config)
    keys = {name: fold_in(key, index) for index, name in enumerate(named_leaves(blank))}

    def leaf(name: str, like: Tensor) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(like.shape)
        if "ln_" in name:
            return torch.ones(like.shape)
        std = _INIT_STD / (2 * config.n_layer) ** 0.5 if "c_proj" in name else _INIT_STD
        return std * normal(keys[name], tuple(like.shape))

    params: Params = tree_map_named(leaf, blank)
    return params


def empty(config: GPT2Config) -> Params:
    """The parameters' structure and shapes without memory: tensors on the `meta` device."""
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


def forward(params: Params, tokens: Tensor, *, config: GPT2Config, attention_mask: Tensor | None = None) -> Tensor:
    """Logits of the next token at every position: `unembed(params, trunk(...))`.

    Args:
        params: GPT-2 parameters.
        tokens: [B, T] int64 in [0, V).
        config: the shape of `params`.
        attention_mask: [B, T] bool, False on padding, left or right; None is no padding.

    Returns:
        [B, T, V] in the parameters' dtype. Rows at padding are meaningless but finite.

    Raises:
        ValueError: shapes do not match, or T exceeds n_positions.
        TypeError: tokens are not int64.
    """
    positions = segments = None
    if attention_mask is not None:
        check_same_shape("forward", tokens=tokens, attention_mask=attention_mask)
        fits = tokens.shape[1] <= config.n_positions
        check_value("forward", fits, f"at most n_positions = {config.n_positions}", length=tokens.shape[1])
        positions, segments = padding_layout(attention_mask)
    return unembed(params, trunk(params, tokens, config=config, positions=positions, segments=segments))


def padding_layout(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, segments) [B, T] int64 of padded rows: real tokens count from 0, padding is segment 0."""
    real = attention_mask.long()
    return (real.cumsum(dim=1) - 1).clamp(min=0), real


def trunk(
    params: Params,
    tokens: Tensor,
    *,
    config: GPT2Config,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    bounds: Tensor | None = None,
    dropout: float = 0.0,
    key: Tensor | None = None,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Hidden states after the final layer norm.

    Args:
        params: GPT-2 parameters.
        tokens: [B, T] int64 in [0, V).
        config: the shape of `params`.
        positions: [B, T] int64 in [0, n_positions); None is 0..T-1 in every row.
        segments: [B, T] int64, equal for tokens that may see each other; None is one segment per row.
        bounds: [S + 1] int32, where segments lie, if each is in one piece (`rlhf.batches.Rows.bounds`); on a GPU
            attention is faster with them.
        dropout: share dropped after the embedding, each attention and each MLP, as GPT-2's `resid_pdrop` and
            `embd_pdrop` (attention weights are not dropped); 0 outside of SFT.
        key: [2] int32, consumed; needed where dropout is not 0.
        gradient_checkpointing: the backward pass computes each block again from its input (`rlhf.kernels.remat.remat`).

    Returns:
        [B, T, D] in the parameters' dtype.

    Raises:
        ValueError: shapes do not match, T exceeds n_positions without positions, bounds come without segments, or
            dropout without a key.
        TypeError: tokens are not int64.
    """
    check_integer("trunk", tokens=tokens)
    check_rank("trunk", 2, tokens=tokens)
    check_value("trunk", bounds is None or segments is not None, "given with bounds", segments=segments)
    length = tokens.shape[1]
    if positions is None:
        check_value("trunk", length <= config.n_positions, f"at most n_positions = {config.n_positions}", length=length)
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    check_same_shape("trunk", tokens=tokens, positions=positions, segments=tokens if segments is None else segments)
    check_value("trunk", 0 <= dropout < 1, "in [0, 1)", dropout=dropout)
    check_value("trunk", dropout == 0 or key is not None, "given when dropout is not 0", key=key)
    bounds = bounds if packs(params["ln_f"]["weight"], config.n_head) else None
    bias_BTT = None if segments is None or bounds is not None else segment_bias(segments)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        if bounds is not None:
            return packed_attention(qkv, bounds)
        q, k, v = _heads_first(qkv)
        return attention(q, k, v, bias_BTT)

    def drop(x: Tensor, place: int) -> Tensor:
        return x if key is None or dropout == 0 else _dropout(x, dropout, fold_in(key, place))

    embedded = _embed(params, tokens, positions)
    return _run(params, embedded, config, attend, drop, gradient_checkpointing=gradient_checkpointing)


def unembed(params: Params, hidden: Tensor, *, aligned: bool = False) -> Tensor:
    """Logits [..., V] of hidden states [..., D] in their dtype, through the embedding (tied weights).

    If `aligned`, with the columns that a GPU's products need, as `rlhf.kernels.products.mask_vocab_padding` has them.
    """
    weight: Tensor = params["wte"]["weight"]
    logits = hidden @ pad_vocab(weight.to(hidden.dtype)).T
    return mask_vocab_padding(logits, len(weight)) if aligned else logits[..., : len(weight)]


def cast_for_compute(params: Params, dtype: torch.dtype) -> Params:
    """Parameters to compute with in `dtype`: the embeddings stay as they are, and are rounded after the look-up.

    So an embedding's gradient adds up in the master weights' dtype: a row that occurs a hundred times in a batch would
    lose most of its gradient in bfloat16.
    """
    return cast(params, dtype) | {"wte": params["wte"], "wpe": params["wpe"]}


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, a tensor per layer. Written in place by `prefill` and `decode`.

    On CPUs slots lie together in the keys, components in the values: so both products with a query run along memory.
    On GPUs all of a slot lies together, for `rlhf.kernels.decode_attention.decode_attention_triton`.
    """

    keys: tuple[Tensor, ...]
    """Each [B, N, H, S]."""
    values: tuple[Tensor, ...]
    """Each [B, N, S, H]."""


def init_cache(params: Params, batch_size: int, slots: int, *, config: GPT2Config) -> KVCache:
    """A cache for `batch_size` sequences of up to `slots` tokens, in the dtype and on the device of the blocks."""
    heads, width, like = (batch_size, config.n_head), config.n_embd // config.n_head, params["ln_f"]["weight"]
    if like.is_cuda:
        keys, values = ([like.new_zeros(batch_size, slots, *heads[1:], width) for _ in params["h"]] for _ in range(2))
        return KVCache(tuple(k.permute(0, 2, 3, 1) for k in keys), tuple(v.transpose(1, 2) for v in values))
    keys = [like.new_zeros(*heads, width, slots) for _ in params["h"]]
    return KVCache(tuple(keys), tuple(like.new_zeros(*heads, slots, width) for _ in keys))


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
    """Read whole prompts, filling the first P slots of cache rows.

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
    rows, source = each if rows is None else rows, each if source is None else source

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = _heads_first(qkv)
        cache.keys[layer][rows, ..., :width] = k[source].transpose(-1, -2)
        cache.values[layer][rows, :, :width] = v[source]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    hidden_UTD = _run(params, _embed(params, tokens, torch.arange(width, device=tokens.device)), config, attend)
    return hidden_UTD[each, lengths - 1][source]


def decode(params: Params, tokens: Tensor, lengths: Tensor, cache: KVCache, *, config: GPT2Config, used: int) -> Tensor:
    """Read one more token per row.

    Args:
        params: GPT-2 parameters.
        tokens: [B] int64, the next token of each row.
        lengths: [B] int64, tokens already in the cache: the position of this one.
        cache: written in place at slot `lengths`.
        config: the shape of `params`.
        used: slots to attend over, above every element of `lengths`: the filled part of the cache.

    Returns:
        [B, D]: the hidden state that predicts the token after this one.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    unseen = torch.arange(used, device=tokens.device) > lengths[:, None]
    bias_BU = torch.where(unseen, -torch.inf, 0.0)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        if qkv.is_cuda:
            from rlhf.kernels.decode_attention import decode_attention_triton  # here, because it imports Triton

            return decode_attention_triton(qkv[:, 0], keys, values, lengths)[:, :, None]
        q, k, v = qkv[:, 0].unbind(1)
        keys[rows, :, :, lengths] = k
        values[rows, :, lengths] = v
        return decode_attention(q, keys[..., :used], values[:, :, :used], bias_BU)[:, :, None]

    return _run(params, _embed(params, tokens[:, None], lengths[:, None]), config, attend)[:, 0]


def to_hugging_face(params: Params) -> dict[str, Tensor]:
    """The state dict of `transformers.GPT2LMHeadModel`, without the tied `lm_head.weight`."""
    return {f"transformer.{name}": leaf for name, leaf in named_leaves(params).items()}


def from_hugging_face(state: dict[str, Tensor], *, config: GPT2Config) -> Params:
    """Parameters from a state dict of `GPT2Model`, `GPT2LMHeadModel` or `GPT2ForSequenceClassification`.

    Names with and without `transformer.` are taken; causal-mask buffers, `lm_head` and `score` are left aside.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """
    ignored = ("lm_head.", "score.")
    named = {name.removeprefix("transformer."): leaf for name, leaf in state.items() if not name.startswith(ignored)}
    named = {name: leaf for name, leaf in named.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    blank = empty(config)
    for name, like in named_leaves(blank).items():
        if name not in named:
            raise ValueError(f"from_hugging_face: {name} is missing")
        if named[name].shape != like.shape:
            got, expected = tuple(named[name].shape), tuple(like.shape)
            raise ValueError(f"from_hugging_face: {name} has shape {got}, expected {expected}")
    params: Params = with_leaves(blank, named)
    return params


def _embed(params: Params, tokens: Tensor, positions: Tensor) -> Tensor:
    """Sum of the two embeddings in the dtype of the blocks; the tables may be wider than it (`cast_for_compute`)."""
    embedded = gather_rows(params["wte"]["weight"], tokens) + gather_rows(params["wpe"]["weight"], positions)
    return embedded.to(params["ln_f"]["weight"].dtype)


def _run(
    params: Params,
    x: Tensor,
    config: GPT2Config,
    attend: Callable[[int, Tensor], Tensor],
    drop: Callable[[Tensor, int], Tensor] = lambda x, place: x,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """All blocks and the final norm over embedded [B, T, D].

    Args:
        params: GPT-2 parameters.
        x: embedded tokens.
        config: the shape of `params`.
        attend: (layer, [B, T, 3, N, H]) -> [B, N, T, H].
        drop: of what is added to the residual stream, by place.
        gradient_checkpointing: of `trunk`.
    """

    def block(x: Tensor, p: Params, *, layer: int) -> Tensor:
        qkv = _affine(_layer_norm(x, p["ln_1"], config), p["attn"]["c_attn"]).view(*x.shape[:2], 3, config.n_head, -1)
        attended_BTD = attend(layer, qkv).transpose(1, 2).reshape(x.shape)
        x = x + drop(_affine(attended_BTD, p["attn"]["c_proj"]), 2 * layer + 1)
        expanded = _gelu(_affine(_layer_norm(x, p["ln_2"], config), p["mlp"]["c_fc"]))
        return x + drop(_affine(expanded, p["mlp"]["c_proj"]), 2 * layer + 2)

    x = drop(x, 0)
    for layer, p in enumerate(params["h"]):
        step = functools.partial(block, layer=layer)
        x = (remat(step) if gradient_checkpointing else step)(x, p)
    return _layer_norm(x, params["ln_f"], config)


def _gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form. Compiled code has a faster exponential than tanh: x sigmoid(2z) = x (1 + tanh z) / 2."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    return (wide * torch.sigmoid(wide * (_GELU_LINEAR + _GELU_CUBIC * wide * wide))).to(x.dtype)


def _affine(x: Tensor, p: Params) -> Tensor:
    if torch.compiler.is_compiling() or "packed" in p:  # compiled, the sum is part of whatever comes next
        return product(x, p) + p["bias"]
    flat = torch.addmm(p["bias"], x.reshape(-1, x.shape[-1]), p["weight"])
    return flat.view(*x.shape[:-1], -1)


def _layer_norm(x: Tensor, p: Params, config: GPT2Config) -> Tensor:
    shape, epsilon = (x.shape[-1],), config.layer_norm_epsilon
    if x.dtype == torch.float32 or not torch.compiler.is_compiling():
        return F.layer_norm(x, shape, p["weight"], p["bias"], epsilon)
    weight, bias = (p[name].expand(len(x), 1, -1) for name in ("weight", "bias"))  # gradients add up by row first
    return F.layer_norm(x, shape, eps=epsilon) * weight + bias


def _heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    """[B, T, 3, N, H] -> queries, keys and values, each [B, N, T, H]."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _dropout(x: Tensor, rate: float, key: Tensor) -> Tensor:
    return torch.where(uniform(key, tuple(x.shape)) >= rate, x / (1.0 - rate), 0.0)
