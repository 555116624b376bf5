"""Random initialisation of a transformer decoder from the names and shapes of its parameters."""

import torch
from torch import Tensor

from rlhf.random import fold_in, normal
from rlhf.tree import named_leaves, tree_map_named
from rlhf.types import Params

_STD = 0.02


def random_parameters(structure: Params, *, key: Tensor, n_layer: int, residual: str | tuple[str, ...]) -> Params:
    """Return random parameters: biases are 0, norms are 1, and matrices are normal with std 0.02.

    Projections into the residual stream have std 0.02 / sqrt(2L).

    Source: Radford et al. 2019, section 2.3 ("scale the weights of residual layers at initialization by 1/sqrt(N)"),
    https://github.com/openai/gpt-2.

    Args:
        structure: parameters of the wanted names and shapes, on any device.
        key: [2] int32 key, which is consumed.
        n_layer: number of blocks L.
        residual: names, or parts of names, of the layers that project into the residual stream.

    Returns:
        The parameters in float32.

    Example:
        >>> structure = {"norm": {"weight": torch.empty(3)}}
        >>> random_parameters(structure, key=rlhf.random.key(0), n_layer=1, residual="proj")
        {'norm': {'weight': tensor([1., 1., 1.])}}
    """
    keys = {name: fold_in(key, index) for index, name in enumerate(named_leaves(structure))}
    residual = (residual,) if isinstance(residual, str) else residual

    def leaf(name: str, like: Tensor) -> Tensor:
        if like.ndim == 1:
            return torch.zeros(like.shape) if name.endswith("bias") else torch.ones(like.shape)
        std = _STD / (2 * n_layer) ** 0.5 if any(part in name for part in residual) else _STD
        return std * normal(keys[name], tuple(like.shape))

    params: Params = tree_map_named(leaf, structure)
    return params
