"""Replacement of reference functions by their fast forms in `rlhf.kernels`."""

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def reference_of(function: Callable[P, T]) -> Callable[P, T]:
    """Return the reference of an accelerated function, or the function itself if it is not accelerated.

    Example:
        >>> reference_of(rlhf.sample_token) is not rlhf.sample_token, reference_of(len) is len
        (True, True)
    """
    reference: Callable[P, T] = getattr(function, "__wrapped__", function)
    return reference


def accelerated(kernel: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that replaces a reference function by its fast form in `rlhf.kernels`.

    A fast form takes the reference as its first argument, followed by the reference's own arguments. It calls the
    reference where it is not faster. Both compute the same result up to rounding, as a test of each pair shows. Without
    the folder `rlhf.kernels` the reference runs.

    Args:
        kernel: name of the fast form, `module.function` in `rlhf.kernels`.

    Example:
        >>> @accelerated("fused_layers.gelu")
        ... def gelu(x):
        ...     return torch.nn.functional.gelu(x, approximate="tanh")
    """
    module, name = kernel.split(".")

    def decorate(reference: Callable[P, T]) -> Callable[P, T]:
        try:
            fast = getattr(importlib.import_module(f"rlhf.kernels.{module}"), name)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("rlhf.kernels"):
                raise
            return reference

        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return fast(reference, *args, **kwargs)

        return call

    return decorate
