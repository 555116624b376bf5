"""Argument checks for pure functions: shapes, dtypes and Python numbers, so that they cost nothing when compiled.

The values of tensors are never read: a hyperparameter that is a tensor passes unchecked, which keeps it open to `vmap`,
`grad` and `torch.compile`. Values in batches are checked on the host before a batch is handed over; see
`rlhf.execution.executor`.
Every message reads `<function>: <argument> <what it is>, expected <rule>`.
"""

import torch
from torch import Tensor


def check_same_shape(function: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the shape of the first."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}, expected {tuple(first.shape)} like {first_name}"
            )


def check_rank(function: str, rank: int, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has `rank` dimensions."""
    for name, tensor in tensors.items():
        if tensor.ndim != rank:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions")


def check_mask(function: str, mask: Tensor, **like: Tensor) -> None:
    """Raise TypeError unless `mask` is bool, ValueError unless all `like` tensors share its shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: mask has dtype {mask.dtype}, expected torch.bool (True = counts)")
    check_same_shape(function, **like, mask=mask)


def check_integer(function: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor holds int64 (token ids, positions, indices)."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{function}: {name} has dtype {tensor.dtype}, expected torch.int64")


def check_value(function: str, ok: bool | Tensor, rule: str, **value: object) -> None:
    """Raise ValueError unless `ok`, naming the one keyword argument, its value and the `rule` it breaks.

    A tensor `ok` passes unread. Write a range as `(x >= 0) & (x <= 1)`: `0 <= x <= 1` would read the tensor.
    """
    if not isinstance(ok, Tensor) and not ok:
        ((name, got),) = value.items()
        raise ValueError(f"{function}: {name} is {got}, expected {rule}")
