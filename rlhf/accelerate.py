"""The seam between reference functions and their fast forms in `rlhf.kernels`."""

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def reference_of(function: Callable[P, T]) -> Callable[P, T]:
    """Return the reference of an accelerated function; any other function itself.

    Example:
        >>> reference_of(rlhf.sample_token) is not rlhf.sample_token, reference_of(len) is len
        (True, True)
    """
    reference: Callable[P, T] = getattr(function, "__wrapped__", function)
    return reference


def accelerated(kernel: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a reference function with its fast form; without the folder `rlhf.kernels` the reference runs.

    A fast form takes the reference as its first argument, then the reference's own, and falls back to it wherever it
    is not faster. Both compute the same but for rounding, which a test of each pair shows.

    Args:
        kernel: `module.function` in `rlhf.kernels`.

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
