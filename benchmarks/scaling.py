"""The Ray layer as a whole: what a step costs beside its computation, and what a second worker brings."""

import contextlib
import dataclasses
import functools
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import ours
from benchmarks.session import Session
from benchmarks.timing import interleave, loopback_bytes, ratio, report, summary
from rlhf import random
from rlhf.batches import Rows, TokenBatch
from rlhf.config import DistConfig, SFTConfig
from rlhf.distributed import connected, open_executor
from rlhf.distributed.ray_executor import RayExecutor
from rlhf.distributed.worker import Worker
from rlhf.execution.executor import Executor
from rlhf.execution.memory import keep_freed_memory
from rlhf.execution.program import ModelState
from rlhf.models import gpt2
from rlhf.models.gpt2_config import PRESETS, GPT2Config
from rlhf.train.sft import make_sft_program

SIZES = {
    "tiny": (GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2), 2, 16),
    "small": (dataclasses.replace(PRESETS["small"], vocab_size=1024), 8, 128),
    "gpt2": (PRESETS["gpt2"], 1, 64),
}
"""Model, rows of each of a step's four micro-batches, tokens of a row."""

NOTHING = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
"""A model whose computation takes no time: what is left is orchestration."""


def run(output: Path, *, size: str = "small", rounds: int = 9) -> list[Path]:
    """Print and write the figures."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with connected(DistConfig(num_workers=6)):
        if size == "small":
            rows += _orchestration(rounds)
        rows += _modes(size, rounds)
        rows += _traffic(size)
        rows += _workers(size, rounds)
    rows += _iteration(size)
    return [report(f"scaling-{size}", rows, output)]


def _row(what: str, times: list[float], reference: list[float] | None = None) -> dict[str, Any]:
    figures = summary(times)
    return {
        "what": what,
        "ms": 1e3 * figures["median"],
        "quartiles": f"{1e3 * figures['low']:.3g} to {1e3 * figures['high']:.3g}",
        "ratio": ratio(times, reference) if reference else "",
    }


@contextlib.contextmanager
def _executor(config: GPT2Config, **dist: Any) -> Iterator[Any]:
    program = functools.partial(make_sft_program, config, SFTConfig(), 1000, torch.float32)
    params = gpt2.init(config, key=random.key(0))
    settings = DistConfig(snapshot_every=10_000, **dist)
    keep_freed_memory()
    with open_executor(program, ModelState(params, {}), settings, device=torch.device("cpu")) as executor:
        yield executor


def _batches(config: GPT2Config, rows: int, count: int, length: int) -> list[TokenBatch]:
    tokens = torch.arange(rows * length).reshape(rows, length) % config.vocab_size
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    packed = Rows(tokens, torch.arange(length).expand(rows, length), torch.ones_like(tokens), bounds)
    index = torch.arange(rows * length).reshape(rows, length)[:, :-1].flatten()
    mask = torch.ones_like(index, dtype=torch.bool)
    return [TokenBatch(packed, index, tokens[:, 1:].flatten(), mask, random.key(number)) for number in range(count)]


def _of(size: str) -> tuple[GPT2Config, list[TokenBatch]]:
    config, rows, length = SIZES[size]
    return config, _batches(config, rows, 4, length)


def _orchestration(rounds: int) -> list[dict[str, Any]]:
    """A step and a map of next to no computation."""
    batches, found = _batches(NOTHING, 1, 4, 8), []
    for workers in (0, 1, 2, 4):
        with _executor(NOTHING, num_workers=workers) as executor:
            times = interleave(
                {"step": lambda: executor.step("main", batches), "map": lambda: executor.map("measure", batches)},
                10 * rounds,
                warmup=5,
            )
            found += [
                _row(f"{name} of 4 empty micro-batches, {workers} workers", values) for name, values in times.items()
            ]
    return found


def _modes(size: str, rounds: int) -> list[dict[str, Any]]:
    """The fixed tree against the backend's allreduce, on the same workers."""
    config, batches = _of(size)
    with _executor(config, num_workers=2) as executor:

        def step(mode: str) -> None:
            executor._dist = dataclasses.replace(executor._dist, reduce=mode)
            executor.step("main", batches)

        times = interleave({mode: functools.partial(step, mode) for mode in ("tree", "ring")}, 2 * rounds, warmup=2)
    return [
        _row(f"step of {size}, 2 workers, {mode}", values, times["ring"] if mode == "tree" else None)
        for mode, values in times.items()
    ]


def _traffic(size: str, steps: int = 3) -> list[dict[str, Any]]:
    """Bytes that gloo sends per step and worker, in units of the parameters' bytes, each way."""
    config, batches = _of(size)
    found = []
    for workers in (2, 4):
        with _executor(config, num_workers=workers, backend="gloo") as executor:
            executor.step("main", batches)
            time.sleep(2.0)
            before = loopback_bytes()
            for _ in range(steps):
                executor.step("main", batches)
            sent = (loopback_bytes() - before) / steps / workers
            size_of_params = 4 * executor._layout.size
            found.append(
                {
                    "what": f"sent per step and worker of {size}, {workers} workers",
                    "ms": "",
                    "quartiles": f"{sent / 1e6:.1f} MB",
                    "ratio": sent / size_of_params,
                }
            )
    return found


def _workers(size: str, rounds: int) -> list[dict[str, Any]]:
    """One process, one worker and two, each on one thread, on the same steps."""
    config, batches = _of(size)
    with contextlib.ExitStack() as stack:
        executors: dict[str, Executor] = {
            f"{number} workers": stack.enter_context(_executor(config, num_workers=number)) for number in (0, 1, 2)
        }
        times = interleave(
            {name: functools.partial(executor.step, "main", batches) for name, executor in executors.items()},
            rounds,
            warmup=2,
        )
    return [
        _row(f"step of {size}, {name}, one thread each", values, times["1 workers"] if name != "1 workers" else None)
        for name, values in times.items()
    ]


def _iteration(size: str) -> list[dict[str, Any]]:
    """What of a PPO iteration on one worker is spent in calls, beyond the worker's work in them."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="rlhf-benchmarks-") as folder, _timed_calls() as calls:
        made = ours.make_material(Path(folder), size)
        compiling = size != "gpt2"  # takes ten minutes there
        watch = _Watch(calls, rounds=2 if compiling else 1)
        files = {"model": str(made.model), "reward": str(made.reward), "prompts_file": str(made.prompts)}
        how = {"critic": "separate", "precision": "bf16", "compile": "on" if compiling else "off", "workers": 1}
        ours.ppo(watch, size=size, device="cpu", **files, **how)
    (begun, asked, busy), (ended, asked_then, busy_then) = watch.marks[-2:]
    orchestration = asked_then - asked - (busy_then - busy)
    return [
        {
            "what": f"PPO iteration of {size}, bf16, 1 worker of 2 threads: in calls, beyond the worker's work",
            "ms": 1e3 * orchestration,
            "quartiles": f"of {1e3 * (ended - begun):.4g} ms",
            "ratio": orchestration / (ended - begun),
        }
    ]


class _TimedWorker(Worker):
    """Adds up the seconds that it works."""

    busy_s = 0.0

    def map(self, *arguments: Any) -> Any:
        return self._timed(super().map, *arguments)

    def step(self, *arguments: Any) -> Any:
        return self._timed(super().step, *arguments)

    def busy(self) -> float:
        return self.busy_s

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = work(*arguments)
        self.busy_s += time.perf_counter() - begun
        return result


class _Calls:
    """The calls of an executor: what they took, and what its worker worked."""

    def __init__(self) -> None:
        self.seconds, self._executor = 0.0, None

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, adding up the seconds that it takes."""

        def call(executor: RayExecutor, *arguments: Any, **options: Any) -> Any:
            self._executor, begun = executor, time.perf_counter()
            result = method(executor, *arguments, **options)
            self.seconds += time.perf_counter() - begun
            return result

        return call

    def busy_s(self) -> float:
        """Seconds that the worker has worked."""
        return self._executor._members.call(self._executor._members.workers, "busy")[0]


@contextlib.contextmanager
def _timed_calls() -> Iterator[_Calls]:
    """Let executors opened in this block measure themselves."""
    calls = _Calls()
    with contextlib.ExitStack() as stack:
        for method in ("map", "step"):
            timed = calls.timed(getattr(RayExecutor, method))
            stack.enter_context(mock.patch.object(RayExecutor, method, timed))
        stack.enter_context(mock.patch("rlhf.distributed.cluster.Worker", _TimedWorker))
        yield calls


class _Watch(Session):
    """Asks for so many rounds, and marks when each begins and the last ends."""

    def __init__(self, calls: _Calls, rounds: int) -> None:
        super().__init__(io.StringIO("round\n" * rounds), io.StringIO())
        self._calls = calls
        self.marks: list[tuple[float, float, float]] = []
        """(now, seconds in calls, seconds that the worker has worked)."""

    def wait(self) -> bool:
        """Mark the time; whether there is a further round."""
        self.marks.append((time.perf_counter(), self._calls.seconds, self._calls.busy_s()))
        return super().wait()
