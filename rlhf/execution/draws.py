"""Fast forms of `rlhf.models.decode_state.decode_steps`: compiled, and on a GPU recorded as a CUDA graph."""

import itertools
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.execution.compiled import compiled
from rlhf.models.decode_state import DecodeOutput, DecodeState, decode_steps
from rlhf.tree import tree_map

DecodeSteps = Callable[..., tuple[DecodeState, DecodeOutput]]


def compiled_draw(folder: Path) -> DecodeSteps:
    """Return `decode_steps` as compiled code. On a GPU, all steps of a call are one CUDA graph.

    Args:
        folder: folder of compiled code.

    Example:
        >>> draw = compiled_draw(Path("compiled_code"))  # for `draw` of rlhf.generate_completions
        >>> callable(draw)
        True
    """
    on_cpu = compiled(decode_steps, folder, compile_products=True)
    on_gpu = CUDAGraphRunner(one_by_one(compiled(decode_steps, folder)))

    def draw(
        params: Any, value_head: Any, batch: DecodeState, *rest: Tensor, **options: Any
    ) -> tuple[DecodeState, DecodeOutput]:
        return (on_cpu if batch.hidden.is_cpu else on_gpu)(params, value_head, batch, *rest, **options)

    return draw


def one_by_one(draw: DecodeSteps) -> DecodeSteps:
    """Return a function that calls `draw` for each token, so that only the code for one token is compiled.

    Args:
        draw: `decode_steps`, or a compiled form of it.

    Example:
        >>> draw = one_by_one(decode_steps)  # for `draw` of rlhf.generate_completions
        >>> callable(draw)
        True
    """

    def call(params: Any, value_head: Any, batch: DecodeState, *rest: Tensor, count: int, **options: Any) -> Any:
        parts = []
        for _ in range(count):
            batch, drawn = draw(params, value_head, batch, *rest, count=1, **options)
            parts.append(drawn)
        return batch, DecodeOutput(*(torch.cat(field) for field in zip(*parts, strict=True)))

    return call


class CUDAGraphRunner:
    """A function on a GPU, recorded once for each combination of shapes and options and then replayed.

    A replay launches all kernels together, without work of the host between them. The kernels read and write the same
    memory each time. Arguments are therefore copied into the buffers of the recording, unless they are these buffers
    already, such as results of the last call. Results are valid until the next call.

    Source: CUDA graphs, https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Record `function`.

        Args:
            function: function whose first two arguments are models, which it does not change. It may change other
                arguments in place if a second run with the same arguments writes the same values. It must not wait for
                the device.
        """
        self._function = function
        self._pool: Any = None
        self._buffers: dict[Hashable, Tensor] = {}
        self._models: dict[Hashable, tuple[weakref.ref[Tensor], int]] = {}
        """Source tensor of each buffer of a model, and the version counter of that tensor."""
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run the function. Its results are valid until the next call."""
        numbers, kinds = itertools.count(), []

        def load(leaf: Any, *, model: bool) -> Any:
            number = next(numbers)
            if not isinstance(leaf, Tensor):
                kinds.append(leaf)
                return leaf
            kind = (number, leaf.shape, leaf.stride(), leaf.dtype)
            kinds.append(kind)
            return self._load(kind, leaf, model)

        buffers = [tree_map(lambda leaf, n=n: load(leaf, model=n < 2), tree) for n, tree in enumerate(arguments)]
        case = (tuple(kinds), tuple(options.items()))
        if case not in self._recordings:
            self._recordings[case] = self._record(buffers, options)
        recording = self._recordings[case]
        recording.graph.replay()
        return recording.results

    def _load(self, kind: Hashable, leaf: Tensor, model: bool) -> Tensor:
        if kind not in self._buffers:
            self._buffers[kind] = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        buffer = self._buffers[kind]
        source, changes = self._models.get(kind, (None, 0))
        is_current = source is not None and source() is leaf and changes == leaf._version
        if not is_current and leaf.data_ptr() != buffer.data_ptr():
            buffer.copy_(leaf)
            if model:
                self._models[kind] = (weakref.ref(leaf), leaf._version)
        return buffer

    def _record(self, buffers: list[Any], options: dict[str, Any]) -> "_Recording":
        # The first run compiles, and initialises what a recording cannot initialise.
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._function(*buffers, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = self._function(*buffers, **options)
        self._pool = graph.pool()
        return _Recording(graph, results)


class _Recording(NamedTuple):
    graph: Any
    results: Any
