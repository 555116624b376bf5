"""The parameters of GPT-NeoX: structure, random initialisation, precision, and Hugging Face's state dict.

Parameters are nested dicts and lists, so that a leaf's dotted name is its Hugging Face name without the `gpt_neox.`
prefix; the output layer is `lm_head.weight`, which folders have as `embed_out.weight`:

    embed_in.weight, lm_head.weight [V, D]   final_layer_norm.{weight,bias} [D]   and for each layer layers.i:
    input_layernorm, post_attention_layernorm {weight,bias} [D]
    attention.query_key_value {weight [3 D, D], bias [3 D]}, head by head   attention.dense {weight [D, D], bias [D]}
    mlp.dense_h_to_4h {weight [F, D], bias [F]}   mlp.dense_4h_to_h {weight [D, F], bias [D]}
"""

import torch
from torch import Tensor

from rlhf.models import output_layer
from rlhf.models.gpt_neox_config import GPTNeoXConfig
from rlhf.models.hugging_face import strip_prefix, take_leaves
from rlhf.models.initial_parameters import random_parameters
from rlhf.models.layers import pack_linear
from rlhf.tree import cast, named_leaves
from rlhf.types import Params

EMBEDDING = "embed_in"
OUTPUT = "embed_out"
PREFIX = "gpt_neox."
BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Suffixes of buffers that older versions of transformers saved."""


def init(config: GPTNeoXConfig, *, key: Tensor) -> Params:
    """Return random parameters, as `rlhf.models.initial_parameters.random_parameters` draws them.

    Args:
        config: shape of the model.
        key: [2] int32 key, which is consumed.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("gpt_neox").presets["tiny"]
        >>> init(config, key=rlhf.random.key(0))["embed_in"]["weight"].shape
        torch.Size([512, 64])
    """
    residual = ("attention.dense", "dense_4h_to_h")
    return random_parameters(empty(config), key=key, n_layer=config.n_layer, residual=residual)


def empty(config: GPTNeoXConfig) -> Params:
    """Return the parameters' structure and shapes without memory: tensors on the `meta` device.

    Args:
        config: shape of the model.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("gpt_neox").presets["tiny"]
        >>> len(empty(config)["layers"])
        2
    """
    width, inner = config.n_embd, config.inner_width

    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def affine(*shape: int, bias: bool = True) -> Params:
        return {"weight": leaf(*shape)} | ({"bias": leaf(shape[0])} if bias else {})

    def block() -> Params:
        return {
            "input_layernorm": affine(width),
            "attention": {
                "query_key_value": affine(3 * width, width, bias=config.attention_bias),
                "dense": affine(width, width, bias=config.attention_bias),
            },
            "post_attention_layernorm": affine(width),
            "mlp": {"dense_h_to_4h": affine(inner, width), "dense_4h_to_h": affine(width, inner)},
        }

    params = {
        EMBEDDING: {"weight": leaf(config.vocab_size, width)},
        "layers": [block() for _ in range(config.n_layer)],
        "final_layer_norm": affine(width),
    }
    own = {} if config.tie_word_embeddings else {output_layer.NAME: {"weight": leaf(config.vocab_size, width)}}
    return params | own


def cast_for_compute(params: Params, dtype: torch.dtype) -> Params:
    """Return parameters to compute with in `dtype`; the embedding keeps its dtype and is rounded after the look-up.

    The embedding's gradient then adds up in the dtype of the master weights.

    Args:
        params: parameters of the model; differentiated.
        dtype: dtype of the computation.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("gpt_neox").presets["tiny"]
        >>> params = init(config, key=rlhf.random.key(0))
        >>> cast_for_compute(params, torch.bfloat16)["final_layer_norm"]["weight"].dtype
        torch.bfloat16
    """
    return cast(params, dtype) | {EMBEDDING: params[EMBEDDING]}


def prepare_for_decoding(params: Params, dtype: torch.dtype) -> Params:
    """Return packed parameters for `prefill`, `decode` and `logits` alone, all in `dtype`.

    Args:
        params: parameters of the model.
        dtype: dtype of the computation.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("gpt_neox").presets["tiny"]
        >>> params = init(config, key=rlhf.random.key(0))
        >>> prepare_for_decoding(params, torch.bfloat16)["embed_in"]["weight"].dtype
        torch.bfloat16
    """

    def block(p: Params) -> Params:
        packed = {
            part: {name: pack_linear(cast(layer, dtype)) for name, layer in p[part].items()}
            for part in ("attention", "mlp")
        }
        return packed | {name: cast(p[name], dtype) for name in ("input_layernorm", "post_attention_layernorm")}

    return output_layer.prepare(EMBEDDING, params, dtype) | {
        "layers": [block(p) for p in params["layers"]],
        "final_layer_norm": cast(params["final_layer_norm"], dtype),
    }


def to_hugging_face(params: Params) -> dict[str, Tensor]:
    """Return the state dict of `transformers.GPTNeoXForCausalLM`, without a tied output layer.

    Args:
        params: parameters of the model.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("gpt_neox").presets["tiny"]
        >>> "gpt_neox.layers.1.input_layernorm.weight" in to_hugging_face(empty(config))
        True
    """
    own = f"{output_layer.NAME}.weight"
    named = named_leaves(params)
    return {f"{OUTPUT}.weight" if name == own else PREFIX + name: leaf for name, leaf in named.items()}


def from_hugging_face(state: dict[str, Tensor], *, config: GPTNeoXConfig) -> Params:
    """Return parameters from a state dict of the causal language model, the bare one, or one with a scalar head.

    Names with and without `gpt_neox.` are accepted, and `lm_head` for `embed_out`. Buffers, `score` and a tied output
    layer are ignored.

    Args:
        state: tensors by name.
        config: shape of the model.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape. The message names it.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("gpt_neox").presets["tiny"]
        >>> params = init(config, key=rlhf.random.key(0))
        >>> list(from_hugging_face(to_hugging_face(params), config=config)) == list(params)
        True
    """
    renamed = {name.replace(f"{OUTPUT}.", f"{output_layer.NAME}."): leaf for name, leaf in state.items()}
    ignored = ("score.", f"{output_layer.NAME}.") if config.tie_word_embeddings else ("score.",)
    weights = {name: leaf for name, leaf in renamed.items() if not name.startswith(ignored)}
    return take_leaves(empty(config), strip_prefix(weights, PREFIX, BUFFERS))
