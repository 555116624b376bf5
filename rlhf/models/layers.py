"""Layers that architectures share: affine and linear maps, norms, activations, dropout and the unembedding."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.accelerate import accelerated
from rlhf.ops import upcast
from rlhf.random import uniform
from rlhf.types import Params


@accelerated("fused_layers.affine")
def affine(x: Tensor, p: Params) -> Tensor:
    """Return x @ weight + bias.

    Args:
        x: [B, T, K] inputs.
        p: {"weight": [K, N], "bias": [N]}, or the result of `pack_affine`.

    Returns:
        [B, T, N] in the dtype of x.

    Example:
        >>> affine(torch.ones(1, 1, 2), {"weight": torch.ones(2, 1), "bias": torch.ones(1)})
        tensor([[[3.]]])
    """
    weight: Tensor = p["weight"]
    return x @ weight + p["bias"]


@accelerated("fused_layers.pack_affine")
def pack_affine(p: Params) -> Params:
    """Return the parameters of an `affine` in the layout that is fastest for single tokens.

    Args:
        p: {"weight": [K, N], "bias": [N]}.

    Example:
        >>> packed = pack_affine({"weight": torch.ones(2, 1), "bias": torch.ones(1)})
        >>> affine(torch.ones(1, 1, 2), packed)
        tensor([[[3.]]])
    """
    return p


@accelerated("fused_layers.linear")
def linear(x: Tensor, p: Params) -> Tensor:
    """Return x @ weight' + bias.

    Args:
        x: [..., K] inputs.
        p: {"weight": [N, K]} with or without "bias": [N], or the result of `pack_linear`.

    Returns:
        [..., N] in the dtype of x.

    Example:
        >>> linear(torch.ones(1, 1, 2), {"weight": torch.ones(3, 2)})
        tensor([[[2., 2., 2.]]])
    """
    return F.linear(x, p["weight"], p.get("bias"))


@accelerated("fused_layers.pack_linear")
def pack_linear(p: Params) -> Params:
    """Return the parameters of a `linear` in the layout that is fastest for single tokens.

    Args:
        p: {"weight": [N, K]}, with or without "bias": [N].

    Example:
        >>> linear(torch.ones(1, 1, 2), pack_linear({"weight": torch.ones(3, 2)}))
        tensor([[[2., 2., 2.]]])
    """
    return p


def join_linear(parts: Sequence[Params]) -> Params:
    """Return the parameters of one `linear` whose result is the results of several, side by side.

    Args:
        parts: parameters of each, which all read the same inputs.

    Example:
        >>> join_linear([{"weight": torch.ones(1, 2)}, {"weight": torch.zeros(3, 2)}])["weight"].shape
        torch.Size([4, 2])
    """
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@accelerated("fused_layers.layer_norm")
def layer_norm(x: Tensor, p: Params, *, eps: float) -> Tensor:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Source: Ba et al. 2016, "Layer Normalization", eq. 4, https://arxiv.org/abs/1607.06450.

    Args:
        x: [..., D] hidden states.
        p: {"weight": [D], "bias": [D]}.
        eps: term added to the variance.

    Example:
        >>> layer_norm(torch.tensor([1.0, 3.0]), {"weight": torch.ones(2), "bias": torch.zeros(2)}, eps=1e-12)
        tensor([-1.,  1.])
    """
    wide = upcast(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed * p["weight"] + p["bias"]).to(x.dtype)


def rms_norm(x: Tensor, p: Params, *, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight.

    Source: Zhang and Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467.

    Args:
        x: [..., D] hidden states.
        p: {"weight": [D]}.
        eps: term added to the mean square.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), {"weight": torch.tensor([5.0, 0.0])}, eps=0.0)
        tensor([4.2426, 0.0000])
    """
    return F.rms_norm(x, (x.shape[-1],), p["weight"], eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gate * sigmoid(gate) * up.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6, https://arxiv.org/abs/2002.05202.

    Args:
        gate: inner states of any shape.
        up: inner states of the same shape.

    Example:
        >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([2.0, 2.0]))
        tensor([  0., 200.])
    """
    return F.silu(gate) * up


@accelerated("fused_layers.gelu")
def gelu(x: Tensor) -> Tensor:
    """Return GELU in its tanh form.

    Source: Hendrycks and Gimpel 2016, section 2, https://arxiv.org/abs/1606.08415.

    Example:
        >>> gelu(torch.tensor([-100.0, 0.0, 100.0]))
        tensor([ -0.,   0., 100.])
    """
    return F.gelu(x, approximate="tanh")


def dropout(x: Tensor, rate: float, *, key: Tensor) -> Tensor:
    """Return x with each element set to 0 with probability `rate`, and the others scaled by 1 / (1 - rate).

    Source: Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.

    Args:
        x: float tensor of any shape.
        rate: probability in [0, 1).
        key: [2] int32 key, which is consumed.

    Example:
        >>> dropout(torch.ones(3), 0.0, key=rlhf.random.key(0))
        tensor([1., 1., 1.])
    """
    return torch.where(uniform(key, tuple(x.shape)) >= rate, x / (1.0 - rate), 0.0)


@accelerated("fused_layers.unembed")
def unembed(hidden: Tensor, embedding: Params, *, vocab_size: int, padded: bool = False) -> Tensor:
    """Return the logits [..., V] of hidden states, in their dtype.

    Args:
        hidden: [..., D] hidden states.
        embedding: {"weight": [V, D]}, or the result of `pack_embedding`.
        vocab_size: number of tokens V.
        padded: True to allow further columns beyond V if they are faster. They hold -1e30, which softmax maps to 0.

    Example:
        >>> unembed(torch.ones(1, 2), {"weight": torch.eye(3, 2)}, vocab_size=3)
        tensor([[1., 1., 0.]])
    """
    weight: Tensor = embedding["weight"]
    return hidden @ weight.to(hidden.dtype).T


@accelerated("fused_layers.pack_embedding")
def pack_embedding(embedding: Params) -> Params:
    """Return an embedding in the layout in which `unembed` is fastest for single tokens.

    Args:
        embedding: {"weight": [V, D]}.

    Example:
        >>> unembed(torch.ones(1, 2), pack_embedding({"weight": torch.eye(3, 2)}), vocab_size=3)
        tensor([[1., 1., 0.]])
    """
    return embedding
