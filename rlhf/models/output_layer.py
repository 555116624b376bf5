"""The output layer of decoders: their embedding, or a leaf of its own, `lm_head.weight` [V, D].

The functions take the name of the embedding among the parameters first; a family binds them to it.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rlhf.models.layers import pack_embedding, unembed
from rlhf.tree import cast
from rlhf.types import Params

NAME = "lm_head"


def logits(embedding: str, params: Params, hidden: Tensor, *, config: Any, padded: bool = False) -> Tensor:
    """Return logits [..., V] of hidden states [..., D], in their dtype.

    Args:
        embedding: name of the embedding.
        params: of the decoder, or their `unembedding`.
        hidden: hidden states.
        config: the shape of `params`.
        padded: as in `rlhf.models.layers.unembed`.
    """
    (layer,) = unembedding(embedding, params).values()
    return unembed(hidden, layer, vocab_size=config.vocab_size, padded=padded)


def unembedding(embedding: str, params: Params) -> Params:
    """Return the part of the parameters that `logits` reads.

    Example:
        >>> unembedding("wte", {"wte": 1, "lm_head": 2})
        {'lm_head': 2}
    """
    name = NAME if NAME in params else embedding
    return {name: params[name]}


def tied(shape: Any) -> Any:
    """Return the shape of the same decoder whose output layer, if it needs one, is the embedding."""
    return dataclasses.replace(shape, tie_word_embeddings=True)


def without_output_layer(params: Params) -> Params:
    """Return the parameters without an output layer of their own, which a model with a scalar head has no use for.

    Example:
        >>> without_output_layer({"wte": 1, "lm_head": 2})
        {'wte': 1}
    """
    return {name: part for name, part in params.items() if name != NAME}


def select_vocab(embedding: str, params: Params, rows: int) -> Params:
    """Return the parameters with the first `rows` rows of the embedding, and of an output layer of its own."""
    names = [name for name in (embedding, NAME) if name in params]
    return params | {name: {"weight": params[name]["weight"][:rows].clone()} for name in names}


def prepare(embedding: str, params: Params, dtype: torch.dtype) -> Params:
    """Return embedding and output layer for decoding, in `dtype`; the one that `logits` reads is packed."""
    packed = {name: pack_embedding(cast(layer, dtype)) for name, layer in unembedding(embedding, params).items()}
    return {embedding: cast(params[embedding], dtype)} | packed
