"""Layers that architectures share: affine maps, norms, activations, dropout, embedding and unembedding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.random import uniform
from rlhf.types import Params


@accelerated("fused_layers.affine")
def affine(x: Tensor, p: Params) -> Tensor:
    """Return x @ weight + bias of x [B, T, K] and {"weight": [K, N], "bias": [N]}, or what `pack_affine` made of it."""
    weight: Tensor = p["weight"]
    return x @ weight + p["bias"]


@accelerated("fused_layers.pack_affine")
def pack_affine(p: Params) -> Params:
    """Return the parameters of an `affine` as its products with single tokens read them fastest."""
    return p


@accelerated("fused_layers.layer_norm")
def layer_norm(x: Tensor, p: Params, *, eps: float) -> Tensor:
    """Return the layer norm of x [..., D] with {"weight": [D], "bias": [D]}.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """
    return F.layer_norm(x, (x.shape[-1],), p["weight"], p["bias"], eps)


@accelerated("fused_layers.gelu")
def gelu(x: Tensor) -> Tensor:
    """Return GELU in its tanh form.

    Source: Hendrycks and Gimpel 2016, section 2, https://arxiv.org/abs/1606.08415.
    """
    return F.gelu(x, approximate="tanh")


def dropout(x: Tensor, rate: float, *, key: Tensor) -> Tensor:
    """Return x with a share `rate` of its elements set to 0 and the others scaled by 1 / (1 - rate).

    Source: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.

    Args:
        x: float.
        rate: in [0, 1).
        key: [2] int32, consumed.
    """
    return torch.where(uniform(key, tuple(x.shape)) >= rate, x / (1.0 - rate), 0.0)


@accelerated("fused_layers.unembed")
def unembed(hidden: Tensor, embedding: Params, *, vocab_size: int, padded: bool = False) -> Tensor:
    """Return logits [..., V] of hidden states [..., D], in their dtype.

    Args:
        hidden: hidden states.
        embedding: {"weight": [V, D]}, or what `pack_embedding` made of it.
        vocab_size: V.
        padded: allow columns beyond V, all of them -1e30 (softmax makes exactly 0 of that), where they make it faster.
    """
    weight: Tensor = embedding["weight"]
    return hidden @ weight.to(hidden.dtype).T


@accelerated("fused_layers.pack_embedding")
def pack_embedding(embedding: Params) -> Params:
    """Return an embedding as `unembed` reads it fastest for single tokens."""
    return embedding
