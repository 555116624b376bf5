"""The parameters of Llama, Qwen2 and Qwen3: structure, random initialisation, precision, and Hugging Face's state dict.

Parameters are nested dicts and lists; a leaf's dotted name is its Hugging Face name without the `model.` prefix:

    embed_tokens.weight [V, D]   norm.weight [D]   lm_head.weight [V, D] where it is not tied, and for each layer:
    layers.i.input_layernorm, layers.i.post_attention_layernorm {weight [D]}
    layers.i.self_attn.q_proj {weight [N H, D]}, k_proj, v_proj {weight [G H, D]}, o_proj {weight [D, N H]}
    layers.i.self_attn.q_norm, k_norm {weight [H]}, in Qwen3 alone
    layers.i.mlp.gate_proj, up_proj {weight [F, D]}, down_proj {weight [D, F]}

Projections have a `bias` beside their weight if the shape says so. For decoding, `qkv_proj` and `gate_up_proj` replace
the projections that read the same states.
"""

import torch
from torch import Tensor

from rlhf.models import output_layer
from rlhf.models.hugging_face import strip_prefix, take_leaves
from rlhf.models.initial_parameters import random_parameters
from rlhf.models.layers import join_linear, pack_linear
from rlhf.models.llama_config import LlamaConfig
from rlhf.tree import cast, named_leaves
from rlhf.types import Params

EMBEDDING = "embed_tokens"
PREFIX = "model."
BUFFERS = (".rotary_emb.inv_freq",)
"""Suffixes of buffers that older versions of transformers saved."""


def init(config: LlamaConfig, *, key: Tensor) -> Params:
    """Return random parameters, as `rlhf.models.initial_parameters.random_parameters` draws them.

    Args:
        config: shape of the model.
        key: [2] int32 key, which is consumed.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("llama").presets["tiny"]
        >>> init(config, key=rlhf.random.key(0))["embed_tokens"]["weight"].shape
        torch.Size([512, 64])
    """
    residual = ("o_proj", "down_proj")
    return random_parameters(empty(config), key=key, n_layer=config.n_layer, residual=residual)


def empty(config: LlamaConfig) -> Params:
    """Return the parameters' structure and shapes without memory: tensors on the `meta` device.

    Args:
        config: shape of the model.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("llama").presets["tiny"]
        >>> len(empty(config)["layers"])
        2
    """
    width, head, inner = config.n_embd, config.head_width, config.inner_width
    queries, keys = config.n_head * head, config.kv_heads * head

    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def linear(outputs: int, inputs: int, bias: bool) -> Params:
        return {"weight": leaf(outputs, inputs)} | ({"bias": leaf(outputs)} if bias else {})

    def block() -> Params:
        attention = {
            "q_proj": linear(queries, width, config.qkv_bias),
            "k_proj": linear(keys, width, config.qkv_bias),
            "v_proj": linear(keys, width, config.qkv_bias),
            "o_proj": linear(width, queries, config.attention_bias),
        }
        if config.qk_norm:
            attention |= {"q_norm": {"weight": leaf(head)}, "k_norm": {"weight": leaf(head)}}
        return {
            "input_layernorm": {"weight": leaf(width)},
            "self_attn": attention,
            "post_attention_layernorm": {"weight": leaf(width)},
            "mlp": {
                "gate_proj": linear(inner, width, config.mlp_bias),
                "up_proj": linear(inner, width, config.mlp_bias),
                "down_proj": linear(width, inner, config.mlp_bias),
            },
        }

    params = {
        EMBEDDING: {"weight": leaf(config.vocab_size, width)},
        "layers": [block() for _ in range(config.n_layer)],
        "norm": {"weight": leaf(width)},
    }
    return (
        params
        if config.tie_word_embeddings
        else params | {output_layer.NAME: {"weight": leaf(config.vocab_size, width)}}
    )


def cast_for_compute(params: Params, dtype: torch.dtype) -> Params:
    """Return parameters to compute with in `dtype`; the embedding keeps its dtype and is rounded after the look-up.

    The embedding's gradient then adds up in the dtype of the master weights.

    Args:
        params: parameters of the model; differentiated.
        dtype: dtype of the computation.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("llama").presets["tiny"]
        >>> params = init(config, key=rlhf.random.key(0))
        >>> cast_for_compute(params, torch.bfloat16)["norm"]["weight"].dtype
        torch.bfloat16
    """
    return cast(params, dtype) | {EMBEDDING: params[EMBEDDING]}


def prepare_for_decoding(params: Params, dtype: torch.dtype) -> Params:
    """Return joined and packed parameters for `prefill`, `decode` and `logits` alone, all in `dtype`.

    Args:
        params: parameters of the model.
        dtype: dtype of the computation.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("llama").presets["tiny"]
        >>> params = init(config, key=rlhf.random.key(0))
        >>> prepare_for_decoding(params, torch.bfloat16)["embed_tokens"]["weight"].dtype
        torch.bfloat16
    """

    def block(p: Params) -> Params:
        attention, mlp = cast(p["self_attn"], dtype), cast(p["mlp"], dtype)
        norms = {name: cast(p[name], dtype) for name in ("input_layernorm", "post_attention_layernorm")}
        return norms | {
            "self_attn": {name: attention[name] for name in ("q_norm", "k_norm") if name in attention}
            | {
                "qkv_proj": pack_linear(join_linear([attention[name] for name in ("q_proj", "k_proj", "v_proj")])),
                "o_proj": pack_linear(attention["o_proj"]),
            },
            "mlp": {
                "gate_up_proj": pack_linear(join_linear([mlp[name] for name in ("gate_proj", "up_proj")])),
                "down_proj": pack_linear(mlp["down_proj"]),
            },
        }

    return output_layer.prepare(EMBEDDING, params, dtype) | {
        "layers": [block(p) for p in params["layers"]],
        "norm": cast(params["norm"], dtype),
    }


def to_hugging_face(params: Params) -> dict[str, Tensor]:
    """Return the state dict of Hugging Face's causal language model, without a tied `lm_head.weight`.

    Args:
        params: parameters of the model.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("llama").presets["tiny"]
        >>> "model.layers.1.input_layernorm.weight" in to_hugging_face(empty(config))
        True
    """
    own = f"{output_layer.NAME}.weight"
    return {name if name == own else PREFIX + name: leaf for name, leaf in named_leaves(params).items()}


def from_hugging_face(state: dict[str, Tensor], *, config: LlamaConfig) -> Params:
    """Return parameters from a state dict of the causal language model, the bare one, or one with a scalar head.

    Names with and without `model.` are accepted. Rotary buffers, `score` and a tied `lm_head` are ignored.

    Args:
        state: tensors by name.
        config: shape of the model.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape. The message names it.

    Example:
        >>> config = rlhf.models.architecture.get_architecture("llama").presets["tiny"]
        >>> params = init(config, key=rlhf.random.key(0))
        >>> list(from_hugging_face(to_hugging_face(params), config=config)) == list(params)
        True
    """
    ignored = ("score.", "lm_head.") if config.tie_word_embeddings else ("score.",)
    weights = {name: leaf for name, leaf in state.items() if not name.startswith(ignored)}
    return take_leaves(empty(config), strip_prefix(weights, PREFIX, BUFFERS))
