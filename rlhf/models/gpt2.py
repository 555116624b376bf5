"""GPT-2's blocks, bound to the passes of `rlhf.models.transformer`.

`rlhf.models.gpt2_parameters` describes the parameters. Computation runs in their dtype.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", https://github.com/openai/gpt-2;
outputs equal `transformers.GPT2LMHeadModel`.
"""

import functools

from torch import Tensor

from rlhf.models import transformer
from rlhf.models.architecture import Architecture
from rlhf.models.attention import heads_first
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
from rlhf.models.layers import affine, gelu, layer_norm, unembed
from rlhf.models.transformer import Attend, Drop, Transformer, apply_layers
from rlhf.ops import gather_rows
from rlhf.types import Params


def logits(params: Params, hidden: Tensor, *, config: GPT2Config, padded: bool = False) -> Tensor:
    """Return the logits [..., V] of hidden states, in their dtype; the output layer is the embedding.

    Args:
        params: GPT-2 parameters, or their `unembedding`.
        hidden: [..., D] hidden states.
        config: shape of `params`.
        padded: True to allow further columns beyond V, which softmax maps to 0 (`rlhf.models.layers.unembed`).

    Example:
        >>> config = rlhf.PRESETS["tiny"]
        >>> logits(init(config, key=rlhf.random.key(0)), torch.zeros(3, 64), config=config).shape
        torch.Size([3, 512])
    """
    return unembed(hidden, params["wte"], vocab_size=config.vocab_size, padded=padded)


def _blocks(
    params: Params,
    tokens: Tensor,
    positions: Tensor,
    config: GPT2Config,
    attend: Attend,
    drop: Drop,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Return the hidden states after the final norm, as `Transformer.blocks` describes them."""
    eps = config.layer_norm_epsilon

    def block(x: Tensor, p: Params, *, layer: int) -> Tensor:
        qkv = affine(layer_norm(x, p["ln_1"], eps=eps), p["attn"]["c_attn"]).view(*x.shape[:2], 3, config.n_head, -1)
        attended_BTD = attend(layer, *heads_first(qkv)).transpose(1, 2).reshape(x.shape)
        x = x + drop(affine(attended_BTD, p["attn"]["c_proj"]), 2 * layer + 1)
        expanded = gelu(affine(layer_norm(x, p["ln_2"], eps=eps), p["mlp"]["c_fc"]))
        return x + drop(affine(expanded, p["mlp"]["c_proj"]), 2 * layer + 2)

    x = gather_rows(params["wte"]["weight"], tokens) + gather_rows(params["wpe"]["weight"], positions)
    x = drop(x.to(params["ln_f"]["weight"].dtype), 0)  # the tables may have a wider dtype
    x = apply_layers(block, x, params["h"], gradient_checkpointing=gradient_checkpointing)
    return layer_norm(x, params["ln_f"], eps=eps)


_FAMILY = Transformer(_blocks, final_norm="ln_f")
hidden_states = functools.partial(transformer.hidden_states, _FAMILY)
init_cache = functools.partial(transformer.init_cache, _FAMILY)
prefill = functools.partial(transformer.prefill, _FAMILY)
decode = functools.partial(transformer.decode, _FAMILY)

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
