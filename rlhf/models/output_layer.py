"""The output layer of decoders, which is their embedding or a leaf of its own, `lm_head.weight` [V, D].

The first argument of these functions is the name of the embedding among the parameters; a family's module binds it.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rlhf.models.layers import pack_embedding, unembed
from rlhf.tree import cast
from rlhf.types import Params

NAME = "lm_head"
"""Name of an output layer of its own among the parameters."""


def logits(embedding: str, params: Params, hidden: Tensor, *, config: Any, padded: bool = False) -> Tensor:
    """Return the logits [..., V] of hidden states, in their dtype.

    Args:
        embedding: name of the embedding.
        params: parameters of the decoder, or their `unembedding`.
        hidden: [..., D] hidden states.
        config: shape of `params`.
        padded: True to allow further columns beyond V, which softmax maps to 0 (`rlhf.models.layers.unembed`).

    Example:
        >>> params = {"wte": {"weight": torch.ones(512, 2)}}
        >>> logits("wte", params, torch.ones(3, 2), config=rlhf.PRESETS["tiny"]).shape
        torch.Size([3, 512])
    """
    (layer,) = unembedding(embedding, params).values()
    return unembed(hidden, layer, vocab_size=config.vocab_size, padded=padded)


def unembedding(embedding: str, params: Params) -> Params:
    """Return the part of the parameters that `logits` reads.

    Args:
        embedding: name of the embedding.
        params: parameters of the model.

    Example:
        >>> unembedding("wte", {"wte": 1, "lm_head": 2})
        {'lm_head': 2}
    """
    name = NAME if NAME in params else embedding
    return {name: params[name]}


def tied(shape: Any) -> Any:
    """Return the shape of the decoder in which the output layer is the embedding.

    Args:
        shape: shape of a decoder.

    Example:
        >>> from rlhf.models.gpt_neox_config import PRESETS
        >>> tied(PRESETS["tiny"]).tie_word_embeddings
        True
    """
    return dataclasses.replace(shape, tie_word_embeddings=True)


def without_output_layer(params: Params) -> Params:
    """Return the parameters without an output layer of their own, for models with a scalar head.

    Args:
        params: parameters of the model.

    Example:
        >>> without_output_layer({"wte": 1, "lm_head": 2})
        {'wte': 1}
    """
    return {name: part for name, part in params.items() if name != NAME}


def select_vocab(embedding: str, params: Params, rows: int) -> Params:
    """Return the parameters with the first `rows` rows of the embedding, and of an output layer of its own.

    Args:
        embedding: name of the embedding.
        params: parameters of the model.
        rows: number of tokens to keep.

    Example:
        >>> select_vocab("wte", {"wte": {"weight": torch.ones(5, 2)}}, 3)["wte"]["weight"].shape
        torch.Size([3, 2])
    """
    names = [name for name in (embedding, NAME) if name in params]
    return params | {name: {"weight": params[name]["weight"][:rows].clone()} for name in names}


def prepare(embedding: str, params: Params, dtype: torch.dtype) -> Params:
    """Return the embedding and the output layer for decoding, in `dtype`; the one that `logits` reads is packed.

    Args:
        embedding: name of the embedding.
        params: parameters of the model.
        dtype: dtype of the computation.

    Example:
        >>> packed = prepare("wte", {"wte": {"weight": torch.ones(5, 2)}, "lm_head": {"weight": torch.ones(5, 2)}},
        ...     torch.bfloat16)
        >>> packed["wte"]["weight"].dtype
        torch.bfloat16
    """
    packed = {name: pack_embedding(cast(layer, dtype)) for name, layer in unembedding(embedding, params).items()}
    return {embedding: cast(params[embedding], dtype)} | packed
