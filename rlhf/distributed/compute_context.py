"""Device, threads and workers of a program."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch

from rlhf.config import ComputeConfig, DistConfig
from rlhf.distributed import connected, open_executor
from rlhf.errors import UserError
from rlhf.execution.executor import Executor
from rlhf.execution.program import ModelState, Program
from rlhf.io.user_log import log_user


def find_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device of a configuration.

    Raises:
        UserError: there is no GPU for `cuda`.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no NVIDIA GPU on this machine; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    """Return the dtype of the models' forward and backward passes."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def precision_warnings(config: ComputeConfig, device: torch.device) -> list[str]:
    """Return a warning if the configuration asks for bf16 on a CPU without instructions for it, else nothing."""
    if config.precision == "bf16" and lacks_bf16(device):
        return ["WARNING: bf16 is many times slower than fp32 on this CPU, which has no AVX-512: use --precision fp32"]
    return []


def lacks_bf16(device: torch.device) -> bool:
    """Return whether the device is a CPU without AVX-512, on which bf16 is many times slower than fp32."""
    return device.type == "cpu" and "AVX2" in torch.backends.cpu.get_cpu_capability()


def compute_threads(config: ComputeConfig) -> int:
    """Return the number of CPU threads of each computing process. The bits of results depend on it."""
    return config.dist.threads_per_worker if config.dist.num_workers else config.threads or available_cores()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def limit_threads(number: int) -> Iterator[None]:
    """Limit torch to `number` CPU threads until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_CROWD = 1
"""Maximum number of threads per core. With more, they wait for each other, and a run makes hardly any progress."""


def check_workers(dist: DistConfig) -> None:
    """Raise UserError if the workers' threads are more than this machine's cores, unless `oversubscribe` is set."""
    threads, cores = dist.threads_per_worker * (dist.num_workers + dist.num_servers), available_cores()
    if dist.num_workers and dist.address is None and threads > _CROWD * cores and not dist.oversubscribe:
        raise UserError(
            f"--dist.num-workers {dist.num_workers}: workers and servers have {threads} threads, but this machine has "
            f"{cores} cores; lower --dist.num-workers, --dist.num-servers or --dist.threads-per-worker, name a cluster "
            "with --dist.address, or insist with --dist.oversubscribe"
        )


def describe_workers(dist: DistConfig) -> str:
    """Return a line about the number of workers, and about shared cores."""
    servers = f" and {dist.num_servers} parameter servers" if dist.num_servers else ""
    threads, cores = dist.threads_per_worker * (dist.num_workers + dist.num_servers), available_cores()
    crowded = f"; their {threads} threads share {cores} cores" if not dist.address and threads > cores else ""
    return f"{dist.num_workers} Ray workers{servers}{crowded}"


class ComputeContext(NamedTuple):
    """Device, threads and workers of the models, and the log for the user."""

    config: ComputeConfig
    """Settings of the computation."""
    device: torch.device
    """Device of computations in this process."""
    notes: list[str]
    """Lines logged so far."""
    stage: str = ""
    """Stage of training, which is a prefix of the logged lines; empty outside of training."""

    def note(self, text: str) -> None:
        """Log a line for the user."""
        self.notes.append(text)
        log_user(text, stage=self.stage)

    def note_all(self, lines: Iterable[str]) -> None:
        """Log each line for the user, unless it was logged before."""
        for line in lines:
            if line not in self.notes:
                self.note(line)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the models' forward and backward passes."""
        return compute_dtype(self.config.precision)

    def open_executor(
        self, make_program: Callable[[], Program], models: ModelState
    ) -> contextlib.AbstractContextManager[Executor]:
        """Return a context manager of the configured executor, as `rlhf.distributed.open_executor` does."""
        return open_executor(make_program, models, self.config.dist, device=self.device, log=self.note)


@contextlib.contextmanager
def open_compute_context(config: ComputeConfig) -> Iterator[ComputeContext]:
    """Set up device, threads and Ray.

    Raises:
        UserError: there is no such device, or the cluster is unreachable.
    """
    context = ComputeContext(config, find_device(config.device), [])
    check_workers(config.dist)
    if config.dist.num_workers:
        context.note(describe_workers(config.dist))
    context.note_all(precision_warnings(config, context.device))
    with limit_threads(compute_threads(config)), connected(config.dist):
        yield context
