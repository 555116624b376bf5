"""Conversion of state dicts whose names are the dotted names of the parameters."""

from torch import Tensor

from rlhf.tree import named_leaves, with_leaves
from rlhf.types import Params


def strip_prefix(state: dict[str, Tensor], prefix: str, ignored_suffixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return the tensors of a state dict by their names without a prefix.

    Args:
        state: tensors by name.
        prefix: prefix to remove.
        ignored_suffixes: suffixes of the names of tensors to leave out.

    Example:
        >>> state = {"transformer.wte": torch.ones(1), "transformer.mask": torch.ones(1)}
        >>> strip_prefix(state, "transformer.", ("mask",))
        {'wte': tensor([1.])}
    """
    weights = {name.removeprefix(prefix): leaf for name, leaf in state.items()}
    return {name: leaf for name, leaf in weights.items() if not name.endswith(ignored_suffixes)}


def take_leaves(structure: Params, weights: dict[str, Tensor]) -> Params:
    """Return parameters of a structure, from tensors by dotted name.

    Args:
        structure: parameters of the wanted names and shapes, on any device.
        weights: tensors by dotted name.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape. The message names it.

    Example:
        >>> take_leaves({"h": [{"w": torch.empty(2)}]}, {"h.0.w": torch.ones(2)})
        {'h': [{'w': tensor([1., 1.])}]}
    """
    for name, like in named_leaves(structure).items():
        if name not in weights:
            raise ValueError(f"from_hugging_face: {name} is missing")
        if weights[name].shape != like.shape:
            got, expected = tuple(weights[name].shape), tuple(like.shape)
            raise ValueError(f"from_hugging_face: {name} has shape {got}, expected {expected}")
    params: Params = with_leaves(structure, weights)
    return params
