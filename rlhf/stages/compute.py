"""Where a program computes: its device, its threads, its workers."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import torch

from rlhf.config import ComputeConfig, DistConfig
from rlhf.errors import UserError


def find_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a configuration names.

    Raises:
        UserError: it asks for a GPU and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_threads(config: ComputeConfig) -> int:
    """CPU threads of each process that computes. The bits of a result depend on it."""
    return config.dist.threads_per_worker if config.dist.num_workers else config.threads or available_cores()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def limit_threads(number: int) -> Iterator[None]:
    """Let torch use so many CPU threads until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_workers(dist: DistConfig) -> str:
    """The workers in words, and whether they share cores."""
    servers = f" and {dist.num_servers} parameter servers" if dist.num_servers else ""
    threads, cores = dist.threads_per_worker * (dist.num_workers + dist.num_servers), available_cores()
    crowded = f"; their {threads} threads share {cores} cores" if not dist.address and threads > cores else ""
    return f"{dist.num_workers} Ray workers{servers}{crowded}"
