"""Conversion of state dicts whose names are the dotted names of the parameters."""

from torch import Tensor

from rlhf.tree import named_leaves, with_leaves
from rlhf.types import Params


def strip_prefix(state: dict[str, Tensor], prefix: str, ignored_suffixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return a state dict's tensors by their names without `prefix`, but for those that end in an ignored suffix."""
    weights = {name.removeprefix(prefix): leaf for name, leaf in state.items()}
    return {name: leaf for name, leaf in weights.items() if not name.endswith(ignored_suffixes)}


def take_leaves(structure: Params, weights: dict[str, Tensor]) -> Params:
    """Return parameters of a structure, from tensors by dotted name.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """
    for name, like in named_leaves(structure).items():
        if name not in weights:
            raise ValueError(f"from_hugging_face: {name} is missing")
        if weights[name].shape != like.shape:
            got, expected = tuple(weights[name].shape), tuple(like.shape)
            raise ValueError(f"from_hugging_face: {name} has shape {got}, expected {expected}")
    params: Params = with_leaves(structure, weights)
    return params
