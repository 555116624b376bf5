"""Distributed training: the sharded parameter server, its Ray workers, and the choice of an executor."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from rlhf.config import DistConfig
from rlhf.execution.executor import Executor, LocalExecutor
from rlhf.execution.program import ModelState, Program
from rlhf.io.user_log import log_user


@contextlib.contextmanager
def open_executor(
    make_program: Callable[[], Program],
    models: ModelState,
    dist: DistConfig,
    *,
    device: torch.device,
    log: Callable[[str], None] = log_user,
) -> Iterator[Executor]:
    """Yield the executor of a configuration, and close it when the block ends.

    Args:
        make_program: function that returns the program. Other processes call it too, so it must be importable, or a
            partial of an importable function.
        models: initial state of the program.
        dist: number of workers and servers. With `num_workers` 0, everything runs in this process.
        device: device of the computation if everything runs in this process.
        log: function that is called with a line for the user at every fault.

    Raises:
        UserError: the Ray cluster is unreachable, or has too few resources.
    """
    if not dist.num_workers:
        local = LocalExecutor(make_program(), models, device)
        del models  # the executor has copied the trained parameters
        yield local
        return
    from rlhf.distributed.cluster import open_cluster  # here, because importing ray is slow
    from rlhf.distributed.ray_executor import RayExecutor

    with (
        open_cluster(dist) as cluster,
        contextlib.closing(RayExecutor(cluster, make_program, models, log)) as executor,
    ):
        yield executor


@contextlib.contextmanager
def connected(dist: DistConfig) -> Iterator[None]:
    """Keep one connection to Ray for all executors in the block, if the configuration has workers.

    Raises:
        UserError: the Ray cluster is unreachable.
    """
    if not dist.num_workers:
        yield
        return
    from rlhf.distributed.ray_session import open_session

    with open_session(dist):
        yield
