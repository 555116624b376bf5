"""The one place where `torch.compile` is applied: to a whole function of (parameters, frozen models, micro-batch)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from rlhf.tree import tree_map
from rlhf.types import Params

Function = Callable[[Params, dict[str, Params], Any], Any]


def compiled(function: Function, folder: Path) -> Function:
    """`function` as compiled code, made at its first call and kept in `folder` for later runs and other processes.

    Rows, columns and tokens of a micro-batch are symbolic in it: one graph serves every micro-batch. The first call
    holds a lock, so that of several processes one compiles and the others load what it made.

    Args:
        function: pure; its whole graph must be traceable.
        folder: made if missing. Code depends on the number of threads, so each number has a folder of its own.
    """
    graph = torch.compile(function, fullgraph=True)
    started = False

    def call(params: Params, frozen: dict[str, Params], batch: Any) -> Any:
        nonlocal started
        batch = tree_map(_symbolic, batch)
        if started:
            return graph(params, frozen, batch)
        own = folder / f"threads-{torch.get_num_threads()}"
        own.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)  # read by torch at every compilation
        with FileLock(own / "lock"):
            result = graph(params, frozen, batch)
        started = True
        return result

    return call


def has_compiler() -> bool:
    """Whether this machine has what compiled code for the CPU needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def _symbolic(leaf: Tensor) -> Tensor:
    """The leaf with its dimensions marked as symbolic; two elements at least, because the compiler takes 1 as fixed.

    What is added is zeros: filling, for every kind of micro-batch.
    """
    if not leaf.ndim:
        return leaf
    if len(leaf) == 1 and leaf.ndim == 1:
        leaf = torch.cat([leaf, torch.zeros_like(leaf)])
    for dim in range(leaf.ndim):
        torch._dynamo.maybe_mark_dynamic(leaf, dim)
    return leaf
