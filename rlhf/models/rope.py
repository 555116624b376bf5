"""Rotary position embeddings, which turn queries and keys by angles that grow with their positions.

Component i of the first half and component i of the second half are a point in the plane, turned by position * f_i:

    f_i = theta^(-2i / R),   i = 0 … R/2 - 1

Source: Su et al. 2021, "RoFormer", section 3.2.2, https://arxiv.org/abs/2104.09864. Components are paired as in Hugging
Face's files of Llama.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.field_docs import documented
from rlhf.models.rope_config import RopeScaling
from rlhf.ops import upcast


@documented
class Rotation(NamedTuple):
    """The rotation of positions, which is computed once for all layers."""

    cos: Tensor
    """[..., 1, R / 2] float32 cosines of the angles; the axis of length 1 stands for the heads."""
    sin: Tensor
    """[..., 1, R / 2] float32 sines of the angles."""


def rotary_frequencies(width: int, *, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Return the frequencies f [R / 2] float32, in radians per position.

    Scaling of type llama3 makes waves longer than original context / low_freq_factor `factor` times longer, keeps those
    shorter than original context / high_freq_factor, and interpolates the frequencies between.

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, and its code,
    https://github.com/meta-llama/llama-models.

    Args:
        width: number R of components of a head that are rotated, even.
        theta: base of the wavelengths.
        scaling: scaling of the frequencies. None keeps them.
        device: device of the result.

    Example:
        >>> rotary_frequencies(4, theta=100.0, scaling=None, device=torch.device("cpu"))
        tensor([1.0000, 0.1000])
    """
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    if scaling is None:
        return frequencies
    lowered = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return lowered
    waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    kept = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(lowered, frequencies, kept.clamp(0, 1))


def rotation_at(positions: Tensor, frequencies: Tensor) -> Rotation:
    """Return the rotation of positions.

    Args:
        positions: [...] int64 positions.
        frequencies: [R / 2] float32, a result of `rotary_frequencies`.

    Example:
        >>> rotation_at(torch.tensor([0]), torch.ones(2)).cos
        tensor([[[1., 1.]]])
    """
    angles = positions[..., None, None].float() * frequencies
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Return queries or keys whose first R components are rotated; this is computed in float32 or wider.

    Args:
        x: [..., N, H] queries or keys; differentiated.
        rotation: rotation of their positions; R may be less than H.

    Example:
        >>> quarter = Rotation(torch.zeros(1, 1), torch.ones(1, 1))
        >>> rotate(torch.tensor([[1.0, 0.0]]), quarter)
        tensor([[0., 1.]])
    """
    half = rotation.cos.shape[-1]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    a, b = upcast(first), upcast(second)
    turned = (a * rotation.cos - b * rotation.sin, b * rotation.cos + a * rotation.sin)
    return torch.cat([part.to(x.dtype) for part in turned] + ([rest] if rest.shape[-1] else []), dim=-1)
