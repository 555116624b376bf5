"""Detection of running transforms of `torch.func`, for operators that have no rule for some of them."""

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Return True while a transform of `torch.func` or the forward mode of autograd is running.

    Example:
        >>> is_transformed(), torch.vmap(lambda x: x + is_transformed())(torch.zeros(2))
        (False, tensor([1., 1.]))
    """
    is_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return is_forward_mode or torch._C._functorch.peek_interpreter_stack() is not None


def reference_needed(*tensors: Tensor) -> bool:
    """Return True if `tensors` are mapped, differentiated twice or in forward mode, for which fused operators fail.

    Fused operators work outside of transforms, and under a single `torch.func.grad`.

    Example:
        >>> seen = []
        >>> def square(x):
        ...     seen.append(reference_needed(x))
        ...     return (x * x).sum()
        >>> _ = torch.func.grad(square)(torch.ones(2)), torch.func.hessian(square)(torch.ones(2))
        >>> seen
        [False, True]
    """
    if not is_transformed():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    kinds = {interpreter.key() for interpreter in stack}
    if kinds != {torch._C._functorch.TransformType.Grad}:
        return True
    return any(_graphs_of(x) > 1 for x in tensors)


def check_untransformed(function: str, reason: str) -> None:
    """Raise RuntimeError while a transform of `torch.func` is running.

    Args:
        function: name of the calling function, which does not support transforms.
        reason: cause and remedy, for the message.

    Example:
        >>> torch.vmap(lambda x: check_untransformed("my_function", "it reads a tensor's value"))(torch.zeros(2))
        Traceback (most recent call last):
        RuntimeError: my_function: does not support transforms of torch.func: it reads a tensor's value
    """
    if is_transformed():
        raise RuntimeError(f"{function}: does not support transforms of torch.func: {reason}")


def _graphs_of(x: Tensor) -> int:
    """Return the number of graphs that a tensor is part of: one per level of `torch.func.grad`, and autograd's own."""
    count = 0
    while torch._C._functorch.is_gradtrackingtensor(x):
        count += x.requires_grad
        x = torch._C._functorch.get_unwrapped(x)
    return count + x.requires_grad
