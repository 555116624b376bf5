"""Where the work runs: the executor interface, the sharded parameter server, and the Ray workers around it."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from rlhf.config import DistConfig
from rlhf.execution.executor import Executor, LocalExecutor
from rlhf.execution.program import ModelState, Program


@contextlib.contextmanager
def open_executor(
    make_program: Callable[[], Program],
    models: ModelState,
    dist: DistConfig,
    *,
    device: torch.device,
    tell: Callable[[str], None],
) -> Iterator[Executor]:
    """The executor that a configuration asks for, until the block ends.

    Args:
        make_program: an importable function, or a partial of one; other processes call it too.
        models: what the program starts from.
        dist: with `num_workers` 0 everything runs in this process.
        device: of this process, where it computes.
        tell: gets one line for the user whenever something goes wrong.

    Raises:
        UserError: the Ray cluster cannot be reached, or has too few resources.
    """
    if not dist.num_workers:
        yield LocalExecutor(make_program(), models, device)
        return
    from rlhf.distributed.cluster import open_cluster  # here, because importing ray takes a while
    from rlhf.distributed.ray_executor import RayExecutor

    with (
        open_cluster(dist) as cluster,
        contextlib.closing(RayExecutor(cluster, make_program, models, tell)) as executor,
    ):
        yield executor


@contextlib.contextmanager
def connected(dist: DistConfig) -> Iterator[None]:
    """Keep one Ray for several executors, where there are to be workers.

    Raises:
        UserError: the Ray cluster cannot be reached.
    """
    if not dist.num_workers:
        yield
        return
    from rlhf.distributed import ray_session as session

    with session.connected(dist):
        yield
