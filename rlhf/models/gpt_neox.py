"""The blocks of GPT-NeoX, such as Pythia's, bound to the passes of `rlhf.models.transformer`.

`rlhf.models.gpt_neox_parameters` describes the parameters. Computation runs in their dtype.

Source: Black et al. 2022, "GPT-NeoX-20B", https://arxiv.org/abs/2204.06745; Biderman et al. 2023, "Pythia",
https://arxiv.org/abs/2304.01373. Outputs equal those of `transformers.GPTNeoXForCausalLM`.
"""

import functools

import torch.nn.functional as F
from torch import Tensor

from rlhf.models import output_layer, transformer
from rlhf.models.architecture import Architecture
from rlhf.models.gpt_neox_config import PRESETS, GPTNeoXConfig, settings_to_shape, shape_to_settings
from rlhf.models.gpt_neox_parameters import (
    BUFFERS,
    EMBEDDING,
    OUTPUT,
    PREFIX,
    cast_for_compute,
    empty,
    from_hugging_face,
    init,
    prepare_for_decoding,
    to_hugging_face,
)
from rlhf.models.layers import layer_norm, linear
from rlhf.models.rope import rotary_frequencies, rotate, rotation_at
from rlhf.models.transformer import Attend, Drop, Transformer, apply_layers
from rlhf.ops import gather_rows
from rlhf.types import Params


def _blocks(
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    config: GPTNeoXConfig,
    attend: Attend,
    drop: Drop,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Return the hidden states after the final norm, as `Transformer.blocks` describes them."""
    eps = config.layer_norm_eps
    x = gather_rows(params[EMBEDDING]["weight"], tokens).to(params["final_layer_norm"]["weight"].dtype)
    frequencies = rotary_frequencies(
        config.rotary_width, theta=config.rope_theta, scaling=config.rope_scaling, device=x.device
    )
    rotation = rotation_at(positions, frequencies)

    def attention(x: Tensor, p: Params, layer: int) -> Tensor:
        heads = linear(layer_norm(x, p["input_layernorm"], eps=eps), p["attention"]["query_key_value"])
        q, k, v = heads.view(*x.shape[:2], config.n_head, -1).chunk(3, dim=-1)
        qkv = rotate(q, rotation), rotate(k, rotation), v
        attended_BTNH = attend(layer, *(part.transpose(1, 2) for part in qkv)).transpose(1, 2)
        return drop(linear(attended_BTNH.flatten(2), p["attention"]["dense"]), 2 * layer + 1)

    def mlp(x: Tensor, p: Params, layer: int) -> Tensor:
        expanded = F.gelu(linear(layer_norm(x, p["post_attention_layernorm"], eps=eps), p["mlp"]["dense_h_to_4h"]))
        return drop(linear(expanded, p["mlp"]["dense_4h_to_h"]), 2 * layer + 2)

    def block(x: Tensor, p: Params, *, layer: int) -> Tensor:
        attended = x + attention(x, p, layer)
        return attended + mlp(x if config.use_parallel_residual else attended, p, layer)

    x = drop(x, 0)
    x = apply_layers(block, x, params["layers"], gradient_checkpointing=gradient_checkpointing)
    return layer_norm(x, params["final_layer_norm"], eps=eps)


_FAMILY = Transformer(_blocks, final_norm="final_layer_norm")
hidden_states = functools.partial(transformer.hidden_states, _FAMILY)

ARCHITECTURE = Architecture(
    shape=GPTNeoXConfig,
    presets=PRESETS,
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
    settings_to_shape=settings_to_shape,
    shape_to_settings=shape_to_settings,
    trunk_shape=output_layer.tied,
    causal_lm="GPTNeoXForCausalLM",
    sequence_classifier="GPTNeoXForSequenceClassification",
    aliases=frozenset({"GPTNeoXModel"}),
    prefix=PREFIX,
    embedding=f"{EMBEDDING}.weight",
    ignored_suffixes=BUFFERS,
    output_layer=OUTPUT,
)
