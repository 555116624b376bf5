"""The one place where `torch.compile` is applied: to whole functions of models and micro-batches."""

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
"""Parameters below which kernels are called from C++: Python between them costs 3 to 5% of a step there, and 9 to 24%
of a decoded token. All of it is one file for the C++ compiler, which takes minutes where layers are many."""

_ADVICE = ("TensorFloat32 tensor cores", r"\s*Online softmax is disabled")
"""The compiler's warnings to users who could do otherwise: float32 is IEEE here, and what it decides is its affair."""


def compiled(function: Callable[..., Any], folder: Path, *, own_products: bool = False) -> Callable[..., Any]:
    """`function` as compiled code, made at its first call and kept in `folder` for later runs and other processes.

    The first two arguments are models: shapes, strides and types are those of the first call and are not looked at
    again. The dimensions of all others are symbolic: one graph serves micro-batches of every shape, if none has the
    size 1, which the compiler takes as a constant. The first call holds a lock, so that of several processes one
    compiles and the others load what it made.

    Args:
        function: pure; its whole graph must be traceable.
        folder: made if missing. Code depends on the number of threads, so each number has a folder of its own.
        own_products: let the compiler write bfloat16 products of batches of matrices where the CPU has matrix tiles
            (AMX); those that `rlhf.kernels.products.product` makes take half to a third of the library's time.
    """
    graph: Callable[..., Any] | None = None

    def call(params: Params, other: Any, *batch: Any, **options: Any) -> Any:
        nonlocal graph
        if graph is not None:
            return graph(params, other, *batch, **options)
        settings: dict[str, Any] = {
            "guard_filter_fn": functools.partial(_of_batch, models=function.__code__.co_varnames[:2])
        }
        if leaves(params)[0].is_cpu:
            small = own_products or sum(leaf.numel() for leaf in leaves(params)) < _SMALL
            settings |= {"cpp_wrapper": small} | (_own_products() if own_products else {})
        made = torch.compile(_with_own_code(function), fullgraph=True, options=settings)
        tree_map(_mark_symbolic, batch)  # each dimension for itself: equal sizes are a coincidence
        own = folder / f"threads-{torch.get_num_threads()}"
        own.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)  # read by torch at every compilation
        with (
            acquire_lock(own / "lock", blocking=True),
            _shapes.patch(use_duck_shape=False),
            _short_exponentials(),
            warnings.catch_warnings(),
        ):
            for advice in _ADVICE:
                warnings.filterwarnings("ignore", message=advice)
            result = made(params, other, *batch, **options)
        graph = made
        return result

    return call


def has_compiler() -> bool:
    """Whether this machine has what compiled code for the CPU needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


@functools.cache
def _own_products() -> dict[str, Any]:
    """The compiler's settings; nothing is measured, because the choice of a kernel is part of the result's bits."""
    from torch._inductor import config, select_algorithm  # here, because it takes seconds

    def prefer_tiles(choices: list[Any]) -> list[Any]:
        tiles = [choice for choice in choices if config.deterministic and "AMX" in choice.name]
        return tiles or choices

    select_algorithm.add_preprocessing_fn(prefer_tiles)
    return {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,CPP", "deterministic": True}


@contextlib.contextmanager
def _short_exponentials() -> Iterator[None]:
    """Let the compiler take torch's shorter exponential where a CPU's kernel reads bfloat16, as torch's attention does.

    It is within 20 units in the last place of float32, a thousandth of what rounding to bfloat16 takes, and is written
    in line instead of called, which saves a third of the time of softmax and GELU. It makes a large number of NaN, so
    NaN is put back. The compiler has no setting for it.
    """
    written: Any = importlib.import_module("torch._inductor.codegen.cpp").CppVecOverrides  # here: it takes seconds
    state: Any = importlib.import_module("torch._inductor.virtualized").V
    plain_exp, plain_sigmoid = written.exp, written.sigmoid

    def reads_bfloat16() -> bool:
        return any(state.graph.get_dtype(name) == torch.bfloat16 for name in state.kernel.args.input_buffers)

    def exp(x: Any) -> str:
        return f"decltype({x})::blendv({x}.exp_u20(), {x}, {x}.isnan())" if reads_bfloat16() else plain_exp(x)

    def sigmoid(x: Any) -> str:
        one = f"decltype({x})(1)"
        return f"{one} / ({one} + {exp(f'{x}.neg()')})" if reads_bfloat16() else plain_sigmoid(x)

    written.exp, written.sigmoid = staticmethod(exp), staticmethod(sigmoid)
    try:
        with _cache.patch(cache_key_tag="short exponentials"):  # else the cache would not know of them
            yield
    finally:
        written.exp, written.sigmoid = staticmethod(plain_exp), staticmethod(plain_sigmoid)


def _of_batch(guards: Sequence[Any], models: tuple[str, ...]) -> list[bool]:
    """Which of the compiler's conditions are tested at every call: none on models, whose leaves are many."""
    return [not guard.name.startswith(models) for guard in guards]


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy whose code object is no other's.

    The compiler keeps what it made and learnt by code object, and several stages compile the same code: it would take
    constants that differ between them, such as the layout of their parameters, for variables.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _mark_symbolic(leaf: Tensor) -> None:
    for dim in range(leaf.ndim):
        torch._dynamo.maybe_mark_dynamic(leaf, dim)
