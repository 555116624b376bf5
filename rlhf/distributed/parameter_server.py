"""The sharded parameter server, for any loss over any pytree, without a language model."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rlhf.config import DistConfig
from rlhf.distributed import open_executor
from rlhf.execution.executor import Fault
from rlhf.execution.program import ModelState, Program, StepSpec
from rlhf.io.user_log import log_user
from rlhf.optim import Optimizer
from rlhf.tree import tree_map
from rlhf.types import MetricSums, Params


class ParameterServer:
    """A context manager that trains sharded parameters, with the shards in the workers or in dedicated servers.

    Every step is applied exactly once. The bits of the result depend neither on the number of workers nor on lost
    processes.

    Example:
        >>> import torch
        >>> from rlhf import ParameterServer
        >>> from rlhf.config import DistConfig
        >>> from rlhf.optim import adamw
        >>> from rlhf.schedules import constant_schedule
        >>>
        >>> def loss(params, batch):  # the sum over the micro-batch, and metric sums
        ...     inputs, targets = batch
        ...     errors = torch.tanh(inputs @ params["hidden"]) @ params["out"] - targets
        ...     return errors.square().sum(), {"loss/mse_sum": errors.detach().square().sum(), "count": errors.shape[0]}
        >>>
        >>> params = {"hidden": torch.linspace(-1, 1, 32).reshape(4, 8), "out": torch.zeros(8)}
        >>> inputs = torch.linspace(-1, 1, 256).reshape(64, 4)
        >>> batch = list(zip(inputs.split(16), inputs.sum(dim=1).split(16)))  # four micro-batches
        >>>
        >>> with ParameterServer(loss, params, adamw(constant_schedule(0.05)), DistConfig(num_workers=2)) as server:
        ...     for _ in range(100):
        ...         metrics = server.step(batch)
        ...     trained = server.params()
        >>> metrics["loss/mse"] < 0.03
        True
    """

    def __init__(
        self,
        loss: Callable[[Params, Any], tuple[Tensor, MetricSums]],
        params: Params,
        optimizer: Optimizer,
        dist: DistConfig,
        *,
        max_grad_norm: float = float("inf"),
        log: Callable[[str], None] = log_user,
    ) -> None:
        """Start the workers.

        Args:
            loss: pure function (params, micro-batch) -> (loss sum, metric sums with `count`). Other processes call it
                too, so it must be in an importable module or in the running script.
            params: any pytree of float32 tensors.
            optimizer: element-wise optimiser, such as `rlhf.optim.adamw`.
            dist: number of workers and servers, and reaction to faults. Without workers, everything runs in this
                process.
            max_grad_norm: maximum global norm of the mean gradient; inf disables clipping.
            log: function that is called with a line at every fault.

        Raises:
            UserError: the Ray cluster is unreachable, or has too few resources.
            ValueError: the optimiser needs whole leaves.
        """
        make_program = functools.partial(_make_program, loss, optimizer, max_grad_norm)
        self._resources = contextlib.ExitStack()
        self._executor = self._resources.enter_context(
            open_executor(make_program, ModelState(params, {}), dist, device=torch.device("cpu"), log=log)
        )

    @property
    def version(self) -> int:
        """Number of steps applied."""
        return self._executor.version

    def step(self, batches: Sequence[Any]) -> dict[str, float]:
        """Apply one optimiser step on the summed gradient of the micro-batches (pytrees of tensors).

        Returns:
            Means of the metrics, and `grad_norm`.

        Raises:
            NonFiniteError: a loss or gradient is not finite; nothing has changed.
        """
        return self._executor.step("main", batches)

    def params(self) -> Params:
        """Return a copy of the current parameters, on the CPU."""
        params: Params = tree_map(torch.clone, self._executor.params())
        return params

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the parameters and the optimiser state by dotted name, for `safetensors` and `restore`."""
        return {name: leaf.clone() for name, leaf in self._executor.snapshot().items()}

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """Continue from a snapshot taken after `version` steps, with any number of workers.

        Raises:
            ValueError: the snapshot belongs to other parameters.
        """
        self._executor.restore(state, version)

    def faults(self) -> list[Fault]:
        """Return the faults since the last call."""
        return self._executor.faults()

    def close(self) -> None:
        """End all workers, and Ray if it was started for them."""
        self._resources.close()

    def __enter__(self) -> "ParameterServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make_program(
    loss: Callable[[Params, Any], tuple[Tensor, MetricSums]], optimizer: Optimizer, max_grad_norm: float
) -> Program:
    def objective(params: Params, frozen: dict[str, Params], batch: Any) -> tuple[Tensor, MetricSums]:
        total, metrics = loss(params, batch)
        return total, {name: torch.as_tensor(value) for name, value in metrics.items()}

    return Program({"main": StepSpec(objective, optimizer, max_grad_norm)}, {}, {})
