"""Compilation of whole functions of models and micro-batches with `torch.compile`, which no other module calls."""

import contextlib
import functools
import importlib
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from rlhf.io.files import acquire_lock
from rlhf.tree import leaves, tree_map
from rlhf.types import Params

_cache: Any = importlib.import_module("torch.compiler.config")
_shapes: Any = importlib.import_module("torch.fx.experimental._config")
_numbers = itertools.count()

_SMALL = 1 << 24
"""Number of parameters below which generated C++ code calls the kernels. Calls from Python cost 3 to 5% of a step, and
9 to 24% of a decoded token, but the C++ compiler takes minutes for a model with many layers."""

_ADVICE = ("TensorFloat32 tensor cores", r"\s*Online softmax is disabled")
"""Warnings of the compiler that do not apply: float32 follows IEEE on purpose, and choices need no report."""


def compiled(function: Callable[..., Any], folder: Path, *, compile_products: bool = False) -> Callable[..., Any]:
    """Return `function` as compiled code, which is made at the first call and kept in `folder` for later runs.

    The first two arguments are models. Their shapes, strides and dtypes must be those of the first call, and are not
    checked again. The dimensions of all other arguments are symbolic, so that one graph serves micro-batches of every
    shape. A dimension must not be 1, which the compiler takes as a constant. The first call holds a lock, so that one
    of several processes compiles and the others load its code.

    Args:
        function: pure function, whose whole graph can be traced.
        folder: folder of compiled code, created if missing. Code depends on the number of threads, so each number has a
            subfolder.
        compile_products: let the compiler generate batched bfloat16 matrix products if the CPU has matrix tiles (AMX),
            which take a half to a third of the time of the library's.

    Example:
        >>> from pathlib import Path
        >>> function = compiled(lambda params, second, batch: params["w"] * batch, Path("compiled_code"))
        >>> callable(function)  # the first call, function({"w": ...}, {}, batch), compiles
        True
    """
    graph: Callable[..., Any] | None = None

    def call(params: Params, second: Any, *batch: Any, **options: Any) -> Any:
        nonlocal graph
        if graph is not None:
            return graph(params, second, *batch, **options)
        settings: dict[str, Any] = {
            "guard_filter_fn": functools.partial(_filter_guards, models=function.__code__.co_varnames[:2])
        }
        if leaves(params)[0].is_cpu:
            small = compile_products or sum(leaf.numel() for leaf in leaves(params)) < _SMALL
            settings |= {"cpp_wrapper": small} | (_product_settings() if compile_products else {})
        traced = torch.compile(_copy_code(function), fullgraph=True, options=settings)
        tree_map(_mark_symbolic, batch)  # each dimension separately: equal sizes are a coincidence
        cache = folder / f"threads-{torch.get_num_threads()}"
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # read by torch at every compilation
        with (
            acquire_lock(cache / "lock", blocking=True),
            _shapes.patch(use_duck_shape=False),
            _short_exponentials(),
            warnings.catch_warnings(),
        ):
            for advice in _ADVICE:
                warnings.filterwarnings("ignore", message=advice)
            result = traced(params, second, *batch, **options)
        graph = traced
        return result

    return call


def has_compiler() -> bool:
    """Return True if this machine has a C++ compiler, which compiled code for the CPU needs.

    Example:
        >>> has_compiler() in (True, False)
        True
    """
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


@functools.cache
def _product_settings() -> dict[str, Any]:
    """Return the compiler's settings without autotuning, because the choice of a kernel changes the bits of results."""
    from torch._inductor import config, select_algorithm  # here, because it takes seconds

    def prefer_tiles(choices: list[Any]) -> list[Any]:
        tiles = [choice for choice in choices if config.deterministic and "AMX" in choice.name]
        return tiles or choices

    select_algorithm.add_preprocessing_fn(prefer_tiles)
    return {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,CPP", "deterministic": True}


@contextlib.contextmanager
def _short_exponentials() -> Iterator[None]:
    """Make the compiler use torch's faster exponential in CPU kernels that read bfloat16, as torch's attention does.

    Its error of 20 units in the last place of float32 is a thousandth of the rounding to bfloat16. It is inlined, which
    saves a third of the time of softmax and GELU. It returns a large number for NaN, so NaN is restored. The compiler
    has no setting for it.
    """
    overrides: Any = importlib.import_module("torch._inductor.codegen.cpp").CppVecOverrides  # slow to import
    state: Any = importlib.import_module("torch._inductor.virtualized").V
    plain_exp, plain_sigmoid = overrides.exp, overrides.sigmoid

    def reads_bfloat16() -> bool:
        return any(state.graph.get_dtype(name) == torch.bfloat16 for name in state.kernel.args.input_buffers)

    def exp(x: Any) -> str:
        return f"decltype({x})::blendv({x}.exp_u20(), {x}, {x}.isnan())" if reads_bfloat16() else plain_exp(x)

    def sigmoid(x: Any) -> str:
        one = f"decltype({x})(1)"
        return f"{one} / ({one} + {exp(f'{x}.neg()')})" if reads_bfloat16() else plain_sigmoid(x)

    overrides.exp, overrides.sigmoid = staticmethod(exp), staticmethod(sigmoid)
    try:
        with _cache.patch(cache_key_tag="short exponentials"):  # so that the cache depends on them
            yield
    finally:
        overrides.exp, overrides.sigmoid = staticmethod(plain_exp), staticmethod(plain_sigmoid)


def _filter_guards(guards: Sequence[Any], models: tuple[str, ...]) -> list[bool]:
    """Return for each guard whether calls check it. Guards of models, which have many leaves, are not checked."""
    return [not guard.name.startswith(models) for guard in guards]


def _copy_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy with a unique code object.

    The compiler caches by code object, and several stages compile the same function. Without a copy, it would treat
    constants that differ between stages, such as the layout of their parameters, as variables.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _mark_symbolic(leaf: Tensor) -> None:
    for dim in range(leaf.ndim):
        torch._dynamo.maybe_mark_dynamic(leaf, dim)
