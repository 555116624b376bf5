"""The parameters of GPT-2: structure, random initialisation, precision, and Hugging Face's state dict.

Parameters are nested dicts and lists under OpenAI's names, so that a leaf's dotted name is its Hugging Face name
without the `transformer.` prefix:

    wte.weight [V, D]   wpe.weight [T, D]   ln_f.{weight,bias} [D]   and for each layer h.i:
    ln_1, ln_2 {weight,bias} [D]
    attn.c_attn {weight [D, 3D], bias [3D]}   attn.c_proj {weight [D, D], bias [D]}
    mlp.c_fc {weight [D, 4D], bias [4D]}      mlp.c_proj {weight [4D, D], bias [D]}
"""

import torch
from torch import Tensor

from rlhf.models.gpt2_config import GPT2Config
from rlhf.models.hugging_face import strip_prefix, take_leaves
from rlhf.models.initial_parameters import random_parameters
from rlhf.models.layers import pack_affine, pack_embedding
from rlhf.tree import cast, named_leaves
from rlhf.types import Params

MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
"""Suffixes of the causal mask's buffers, which older versions of transformers saved."""


def init(config: GPT2Config, *, key: Tensor) -> Params:
    """Return random parameters: normal with std 0.02, projections into the residual stream with 0.02 / sqrt(2L).

    Source: Radford et al. 2019, section 2.3 ("scale the weights of residual layers at initialization by 1/sqrt(N)").

    Args:
        config: shape of the model.
        key: [2] int32 key, which is consumed.

    Returns:
        The parameters in float32.

    Example:
        >>> params = init(rlhf.PRESETS["tiny"], key=rlhf.random.key(0))
        >>> params["wte"]["weight"].shape
        torch.Size([512, 64])
    """
    return random_parameters(empty(config), key=key, n_layer=config.n_layer, residual="c_proj")


def empty(config: GPT2Config) -> Params:
    """Return the parameters' structure and shapes without memory: tensors on the `meta` device.

    Args:
        config: shape of the model.

    Example:
        >>> empty(rlhf.PRESETS["tiny"])["wpe"]["weight"].shape
        torch.Size([64, 64])
    """
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


def unembedding(params: Params) -> Params:
    """Return the part of the parameters that `logits` reads.

    Args:
        params: parameters of the model.

    Example:
        >>> list(unembedding(empty(rlhf.PRESETS["tiny"])))
        ['wte']
    """
    return {"wte": params["wte"]}


def cast_for_compute(params: Params, dtype: torch.dtype) -> Params:
    """Return parameters to compute with in `dtype`; embeddings keep their dtype and are rounded after the look-up.

    An embedding's gradient then adds up in the dtype of the master weights: in bfloat16, a row that occurs a hundred
    times in a batch would lose most of its gradient.

    Args:
        params: parameters of the model; differentiated.
        dtype: dtype of the computation.

    Example:
        >>> params = cast_for_compute(init(rlhf.PRESETS["tiny"], key=rlhf.random.key(0)), torch.bfloat16)
        >>> params["ln_f"]["weight"].dtype, params["wte"]["weight"].dtype
        (torch.bfloat16, torch.float32)
    """
    return cast(params, dtype) | {"wte": params["wte"], "wpe": params["wpe"]}


def prepare_for_decoding(params: Params, dtype: torch.dtype) -> Params:
    """Return packed parameters for `prefill`, `decode` and `logits` alone, all in `dtype`, embeddings included.

    Args:
        params: parameters of the model.
        dtype: dtype of the computation.

    Example:
        >>> params = prepare_for_decoding(init(rlhf.PRESETS["tiny"], key=rlhf.random.key(0)), torch.bfloat16)
        >>> params["wpe"]["weight"].dtype
        torch.bfloat16
    """

    def block(p: Params) -> Params:
        packed = {part: {name: pack_affine(cast(p[part][name], dtype)) for name in p[part]} for part in ("attn", "mlp")}
        return {"ln_1": cast(p["ln_1"], dtype), "ln_2": cast(p["ln_2"], dtype)} | packed

    wte, wpe, ln_f = (cast(params[name], dtype) for name in ("wte", "wpe", "ln_f"))
    return {"wte": pack_embedding(wte), "wpe": wpe, "h": [block(p) for p in params["h"]], "ln_f": ln_f}


def select_vocab(params: Params, rows: int) -> Params:
    """Return the parameters with the first `rows` rows of the embedding.

    Args:
        params: parameters of the model.
        rows: number of tokens to keep.

    Example:
        >>> select_vocab({"wte": {"weight": torch.ones(5, 2)}}, 3)["wte"]["weight"].shape
        torch.Size([3, 2])
    """
    return params | {"wte": {"weight": params["wte"]["weight"][:rows].clone()}}


def to_hugging_face(params: Params) -> dict[str, Tensor]:
    """Return the state dict of `transformers.GPT2LMHeadModel`, without the tied `lm_head.weight`.

    Args:
        params: parameters of the model.

    Example:
        >>> "transformer.h.0.attn.c_attn.weight" in to_hugging_face(empty(rlhf.PRESETS["tiny"]))
        True
    """
    return {f"transformer.{name}": leaf for name, leaf in named_leaves(params).items()}


def from_hugging_face(state: dict[str, Tensor], *, config: GPT2Config) -> Params:
    """Return parameters from a state dict of `GPT2Model`, `GPT2LMHeadModel` or `GPT2ForSequenceClassification`.

    Names with and without `transformer.` are accepted. Causal-mask buffers, `lm_head` and `score` are ignored.

    Args:
        state: tensors by name.
        config: shape of the model.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape. The message names it.

    Example:
        >>> config = rlhf.PRESETS["tiny"]
        >>> params = init(config, key=rlhf.random.key(0))
        >>> restored = from_hugging_face(to_hugging_face(params), config=config)
        >>> torch.equal(restored["h"][1]["ln_1"]["weight"], params["h"][1]["ln_1"]["weight"])
        True
    """
    weights = {name: leaf for name, leaf in state.items() if not name.startswith(("lm_head.", "score."))}
    return take_leaves(empty(config), strip_prefix(weights, "transformer.", MASK_BUFFERS))
