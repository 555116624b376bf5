"""Argument checks of pure functions: shapes, dtypes and Python numbers, which cost nothing in compiled code.

The values of tensors are never read. A hyperparameter that is given as a tensor is not checked, so that `vmap`, `grad`
and `torch.compile` can trace it. `rlhf.execution.executor` checks the values in batches before it uses them.
Every message reads `<function>: <argument> <what it is>, expected <rule>`.
"""

import torch
from torch import Tensor


def check_same_shape(function: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have the shape of the first.

    Args:
        function: name of the calling function, for the message.
        **tensors: tensors by the name of the argument.

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

    Args:
        function: name of the calling function, for the message.
        rank: expected number of dimensions.
        **tensors: tensors by the name of the argument.

    Example:
        >>> check_rank("my_loss", 2, log_probs=torch.zeros(3))
        Traceback (most recent call last):
        ValueError: my_loss: log_probs has shape (3,), expected 2 dimensions
    """
    for name, tensor in tensors.items():
        if tensor.ndim != rank:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions")


def check_mask(function: str, mask: Tensor, **like: Tensor) -> None:
    """Raise TypeError unless `mask` is bool, and ValueError unless all other tensors have its shape.

    Args:
        function: name of the calling function, for the message.
        mask: the mask.
        **like: tensors that must have the mask's shape, by the name of the argument.

    Example:
        >>> check_mask("my_loss", torch.ones(2), log_probs=torch.zeros(2))
        Traceback (most recent call last):
        TypeError: my_loss: mask has dtype torch.float32, expected torch.bool (True = counts)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: mask has dtype {mask.dtype}, expected torch.bool (True = counts)")
    check_same_shape(function, **like, mask=mask)


def check_integer(function: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is int64, the dtype of token ids, positions and indices.

    Args:
        function: name of the calling function, for the message.
        **tensors: tensors by the name of the argument.

    Example:
        >>> check_integer("my_loss", targets=torch.zeros(2))
        Traceback (most recent call last):
        TypeError: my_loss: targets has dtype torch.float32, expected torch.int64
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{function}: {name} has dtype {tensor.dtype}, expected torch.int64")


def check_value(function: str, ok: bool | Tensor, rule: str, **value: object) -> None:
    """Raise ValueError unless `ok` is true.

    A tensor `ok` is not read. Write a range as `(x >= 0) & (x <= 1)`, because `0 <= x <= 1` would read the tensor.

    Args:
        function: name of the calling function, for the message.
        ok: result of the check.
        rule: expected condition, for the message.
        **value: the checked value, as a single keyword argument by its name.

    Example:
        >>> check_value("my_loss", -1.0 > 0, "above 0", clip_eps=-1.0)
        Traceback (most recent call last):
        ValueError: my_loss: clip_eps is -1.0, expected above 0
    """
    if not isinstance(ok, Tensor) and not ok:
        ((name, got),) = value.items()
        raise ValueError(f"{function}: {name} is {got}, expected {rule}")
