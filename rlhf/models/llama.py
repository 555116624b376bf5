"""The blocks of Llama, Qwen2 and Qwen3, bound to the passes of `rlhf.models.transformer`.

`rlhf.models.llama_parameters` describes the parameters. Computation runs in their dtype.

Source: Touvron et al. 2023, "Llama 2", https://arxiv.org/abs/2307.09288; Qwen Team 2024, "Qwen2.5",
https://arxiv.org/abs/2412.15115; Yang et al. 2025, "Qwen3", https://arxiv.org/abs/2505.09388. Outputs equal those of
`transformers.LlamaForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM`.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from rlhf.models import output_layer, transformer
from rlhf.models.architecture import Architecture
from rlhf.models.layers import linear, rms_norm, swiglu
from rlhf.models.llama_config import (
    LLAMA_PRESETS,
    QWEN2_PRESETS,
    QWEN3_PRESETS,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    settings_to_shape,
    shape_to_settings,
)
from rlhf.models.llama_parameters import (
    BUFFERS,
    EMBEDDING,
    PREFIX,
    cast_for_compute,
    empty,
    from_hugging_face,
    init,
    prepare_for_decoding,
    to_hugging_face,
)
from rlhf.models.rope import Rotation, rotary_frequencies, rotate, rotation_at
from rlhf.models.transformer import Attend, Drop, Transformer, apply_layers
from rlhf.ops import gather_rows
from rlhf.types import Params


def _blocks(
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    config: LlamaConfig,
    attend: Attend,
    drop: Drop,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Return the hidden states after the final norm, as `Transformer.blocks` describes them. Nothing is dropped."""
    eps = config.rms_norm_eps
    x = gather_rows(params[EMBEDDING]["weight"], tokens).to(params["norm"]["weight"].dtype)
    frequencies = rotary_frequencies(
        config.head_width, theta=config.rope_theta, scaling=config.rope_scaling, device=x.device
    )
    rotation = rotation_at(positions, frequencies)

    def block(x: Tensor, p: Params, *, layer: int) -> Tensor:
        qkv = _queries_keys_values(rms_norm(x, p["input_layernorm"], eps=eps), p["self_attn"], config, rotation)
        attended_BTNH = attend(layer, *(part.transpose(1, 2) for part in qkv)).transpose(1, 2)
        x = x + linear(attended_BTNH.flatten(2), p["self_attn"]["o_proj"])
        gate, up = _gate_and_up(rms_norm(x, p["post_attention_layernorm"], eps=eps), p["mlp"])
        return x + linear(swiglu(gate, up), p["mlp"]["down_proj"])

    x = apply_layers(block, x, params["layers"], gradient_checkpointing=gradient_checkpointing)
    return rms_norm(x, params["norm"], eps=eps)


def _queries_keys_values(x: Tensor, p: Params, config: LlamaConfig, rotation: Rotation) -> tuple[Tensor, ...]:
    """Return queries [B, T, N, H], keys and values [B, T, G, H] of normed states [B, T, D], rotated."""
    if "qkv_proj" in p:
        widths = [heads * config.head_width for heads in (config.n_head, config.kv_heads, config.kv_heads)]
        parts = torch.split(linear(x, p["qkv_proj"]), widths, dim=-1)
    else:
        parts = tuple(linear(x, p[name]) for name in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (part.view(*x.shape[:2], -1, config.head_width) for part in parts)
    if config.qk_norm:
        q, k = rms_norm(q, p["q_norm"], eps=config.rms_norm_eps), rms_norm(k, p["k_norm"], eps=config.rms_norm_eps)
    return rotate(q, rotation), rotate(k, rotation), v


def _gate_and_up(x: Tensor, p: Params) -> tuple[Tensor, Tensor]:
    """Return the two inner states [B, T, F] of the MLP."""
    if "gate_up_proj" in p:
        gate, up = linear(x, p["gate_up_proj"]).chunk(2, dim=-1)
        return gate, up
    return linear(x, p["gate_proj"]), linear(x, p["up_proj"])


_FAMILY = Transformer(_blocks, final_norm="norm")
hidden_states = functools.partial(transformer.hidden_states, _FAMILY)

LLAMA = Architecture(
    shape=LlamaConfig,
    presets=LLAMA_PRESETS,
    init=init,
    empty=empty,
    hidden_states=hidden_states,
    logits=functools.partial(output_layer.logits, EMBEDDING),
    unembedding=functools.partial(output_layer.unembedding, EMBEDDING),
    cast_for_compute=cast_for_compute,
    prepare_for_decoding=prepare_for_decoding,
    init_cache=functools.partial(transformer.init_cache, _FAMILY),
    prefill=functools.partial(transformer.prefill, _FAMILY),
    decode=functools.partial(transformer.decode, _FAMILY),
    select_vocab=functools.partial(output_layer.select_vocab, EMBEDDING),
    to_hugging_face=to_hugging_face,
    from_hugging_face=from_hugging_face,
    settings_to_shape=functools.partial(settings_to_shape, LlamaConfig),
    shape_to_settings=shape_to_settings,
    trunk_shape=output_layer.tied,
    causal_lm="LlamaForCausalLM",
    sequence_classifier="LlamaForSequenceClassification",
    aliases=frozenset({"LlamaModel"}),
    prefix=PREFIX,
    embedding=f"{EMBEDDING}.weight",
    ignored_suffixes=BUFFERS,
    has_dropout=False,
)
QWEN2 = dataclasses.replace(
    LLAMA,
    shape=Qwen2Config,
    presets=QWEN2_PRESETS,
    settings_to_shape=functools.partial(settings_to_shape, Qwen2Config),
    causal_lm="Qwen2ForCausalLM",
    sequence_classifier="Qwen2ForSequenceClassification",
    aliases=frozenset({"Qwen2Model"}),
)
QWEN3 = dataclasses.replace(
    LLAMA,
    shape=Qwen3Config,
    presets=QWEN3_PRESETS,
    settings_to_shape=functools.partial(settings_to_shape, Qwen3Config),
    causal_lm="Qwen3ForCausalLM",
    sequence_classifier="Qwen3ForSequenceClassification",
    aliases=frozenset({"Qwen3Model"}),
)
