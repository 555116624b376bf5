"""Argument checks for pure functions: shapes, dtypes and Python numbers, so that they cost nothing when compiled.

The values of tensors are never read: a hyperparameter that is a tensor passes unchecked, which keeps it open to `vmap`,
`grad` and `torch.compile`. Values in batches are checked on the host before a batch is handed over; see
`rlhf.execution.executor`.
Every message reads `<function>: <argument> <what it is>, expected <rule>`.
"""

import torch
from torch import Tensor


def check_same_shape(function: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the shape of the first.

    Example:
        >>> check_same_shape("my_loss", log_probs=torch.zeros(2, 3), advantages=torch.zeros(2, 4))
        Traceback (most recent call last):
        ValueError: my_loss: advantages has shape (2, 4), expected (2, 3) like log_probs
    """
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{function}: {name} has shape {tuple(tensor.shape)}, expected {tuple(first.shape)} like {first_name}"
            )


def check_rank(function: str, rank: int, **tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has `rank` dimensions.

    Example:
        >>> check_rank("my_loss", 2, log_probs=torch.zeros(3))
        Traceback (most recent call last):
        ValueError: my_loss: log_probs has shape (3,), expected 2 dimensions
    """
    for name, tensor in tensors.items():
        if tensor.ndim != rank:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions")


def check_mask(function: str, mask: Tensor, **like: Tensor) -> None:
    """Raise TypeError unless `mask` is bool, ValueError unless all `like` tensors share its shape.

    Example:
        >>> check_mask("my_loss", torch.ones(2), log_probs=torch.zeros(2))
        Traceback (most recent call last):
        TypeError: my_loss: mask has dtype torch.float32, expected torch.bool (True = counts)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: mask has dtype {mask.dtype}, expected torch.bool (True = counts)")
    check_same_shape(function, **like, mask=mask)


def check_integer(function: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor holds int64 (token ids, positions, indices).

    Example:
        >>> check_integer("my_loss", targets=torch.zeros(2))
        Traceback (most recent call last):
        TypeError: my_loss: targets has dtype torch.float32, expected torch.int64
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{function}: {name} has dtype {tensor.dtype}, expected torch.int64")


def check_value(function: str, ok: bool | Tensor, rule: str, **value: object) -> None:
    """Raise ValueError unless `ok`, naming the one keyword argument, its value and the `rule` it breaks.

    A tensor `ok` passes unread. Write a range as `(x >= 0) & (x <= 1)`: `0 <= x <= 1` would read the tensor.

    Example:
        >>> check_value("my_loss", -1.0 > 0, "above 0", clip_eps=-1.0)
        Traceback (most recent call last):
        ValueError: my_loss: clip_eps is -1.0, expected above 0
    """
    if not isinstance(ok, Tensor) and not ok:
        ((name, got),) = value.items()
        raise ValueError(f"{function}: {name} is {got}, expected {rule}")
