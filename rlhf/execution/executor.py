"""The executor interface, through which a stage computes, and its in-process form.

A stage describes its work as a `Program` of pure functions over micro-batches, and runs it through an `Executor`, which
holds the state. The result has the same bits wherever the micro-batches run.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.execution.frozen import FrozenModels
from rlhf.execution.gradients import make_gradients
from rlhf.execution.memory import peak_bytes, reset_peak
from rlhf.execution.program import ModelState, Program
from rlhf.execution.shard import apply, init_shard, slice_shard
from rlhf.execution.update import clip_models, nonfinite_error, plan_update, step_metrics, sums_of_results
from rlhf.field_docs import documented
from rlhf.tree import (
    FlatLayout,
    all_finite,
    chunked_squared_norms,
    flatten,
    named_leaves,
    realign,
    to_device,
    tree_map,
    tree_sum,
    unflatten,
)
from rlhf.types import Params, Tree


@documented
class Fault(NamedTuple):
    """Loss of a process from which the executor has recovered."""

    what: str
    """Description for the user, in one line."""
    recovery_s: float
    """Time until the work continued, in seconds."""
    final: bool
    """True if no restart is left. The executor then continues in this process, and the run should save and end."""


class Executor(Protocol):
    """Runs a program's functions on micro-batches and owns its parameters."""

    @property
    def version(self) -> int:
        """Version of the parameters: the number of optimiser steps applied since the beginning of the run."""

    @property
    def compiled(self) -> bool:
        """True if the steps run as compiled code."""

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """Return the results of `program.eval_fns[name]` for every micro-batch, on the CPU and in order."""

    def step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
        *,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        """Apply one optimiser step on the summed gradient of the micro-batches.

        A step beyond its `StepSpec.limit` returns its metrics but changes nothing, not even `version`.

        Args:
            name: name of the step.
            batches: micro-batches of the step.
            learning_rate: learning rate of this step. None uses the optimiser's schedule.
            overlap: function that is called while workers or a GPU compute the gradients. It is called more than once
                if the step is repeated.

        Returns:
            Means of the metrics, and `grad_norm`.

        Raises:
            NonFiniteError: a loss or gradient is not finite; nothing has changed.
        """

    def update_frozen(self, name: str) -> None:
        """Replace a frozen model by the result of `program.frozen_updates[name]` on it and the parameters."""

    def reset_optimizer(self) -> None:
        """Reset the optimiser's state to its initial value."""

    def params(self) -> Params:
        """Return the current parameters on the CPU. They may be views, to be read before the next step."""

    def snapshot(self) -> dict[str, Tensor]:
        """Return everything that the next step reads: parameters, optimiser state and updated frozen models.

        Keys are dotted names. The tensors are on the CPU and may be views, to be saved or copied before the next step.
        """

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """Continue from a snapshot taken after `version` steps.

        Raises:
            ValueError: the snapshot is of another program.
        """

    def peak_bytes(self) -> int:
        """Return the peak memory of the largest process in bytes, or 0 if the system does not report it."""

    def faults(self) -> list[Fault]:
        """Return the faults since the last call."""


class LocalExecutor:
    """Executor in this process, with one shard. It computes micro-batches one after the other.

    Example:
        >>> from rlhf.execution.program import StepSpec
        >>> def loss(params, frozen, batch):
        ...     errors = params["w"] - batch
        ...     total = errors.square().sum()
        ...     return total, {"loss/mse_sum": total.detach(), "count": torch.tensor(len(batch))}
        >>> optimizer = rlhf.adamw(rlhf.constant_schedule(0.1))
        >>> program = Program({"main": StepSpec(loss, optimizer, max_grad_norm=1.0)}, {}, {})
        >>> executor = LocalExecutor(program, ModelState({"w": torch.zeros(1)}, {}), torch.device("cpu"))
        >>> executor.step("main", [torch.ones(2), torch.ones(1)])["loss/mse"], executor.version
        (1.0, 1)
    """

    def __init__(self, program: Program, models: ModelState, device: torch.device) -> None:
        """Initialise the state of a program on a device.

        Args:
            program: the functions to run.
            models: the initial parameters and the frozen models.
            device: device that holds the state and runs the functions.

        Raises:
            ValueError: an optimiser needs whole leaves.
        """
        program.check_optimizers()
        reset_peak(device)
        self._program, self._device = program, device
        self._frozen = FrozenModels(program, to_device(models.frozen, device))
        self._layout = program.layout(models.params)
        flat = flatten(to_device(models.params, device), self._layout)
        self._shard = init_shard(flat, program.optimizer)
        self._params = unflatten(self._shard.params, self._layout)  # views: every update is visible in them
        self._gradients = make_gradients(program, self._layout)
        self._updating = False  # stays True if an update fails half-way

    @property
    def version(self) -> int:
        """Version of the parameters: the number of optimiser steps applied since the beginning of the run."""
        return self._shard.version

    @property
    def compiled(self) -> bool:
        """True if the steps run as compiled code."""
        return self._program.compile_to is not None

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """Return the results of an evaluation function for every micro-batch, on the CPU and in order."""
        self._check_whole()
        function = self._program.eval_fns[name]
        with torch.no_grad():
            return [
                to_device(function(self._params, self._frozen.prepared, self._batch(batch)), "cpu") for batch in batches
            ]

    def step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
        *,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        """Apply one optimiser step on the summed gradient of the micro-batches, as `Executor.step` describes."""
        self._check_whole()
        spec, results = self._program.steps[name], []

        def gradient(batch: Any) -> tuple[Tensor, Any]:
            return self._gradients[name](self._params, self._frozen.prepared, self._batch(batch))

        def flat_gradient(batch: Any) -> Tensor:
            flat, result = gradient(batch)
            results.append(result)
            return flat

        gradient_sum = tree_sum(map(flat_gradient, batches), add=Tensor.add_)
        squares = chunked_squared_norms(gradient_sum)
        slices = slice_shard(self._shard, gradient_sum, spec.optimizer, self._layout)
        overlap()
        results = to_device(results, "cpu")  # the only wait for a GPU: it applies the update in the background
        update = plan_update(sums_of_results(results, spec), squares.cpu(), spec, self._layout)
        if not update.is_finite:
            raise nonfinite_error(name, batches, results, update, lambda batch: all_finite(gradient(batch)))
        if update.within_limit:
            self._updating = True
            clip_models(gradient_sum, update, self._layout)
            self._shard = apply(self._shard, self.version, slices, update.scale, spec.optimizer, learning_rate)
            self._updating = False
        return step_metrics(results, update)

    def update_frozen(self, name: str) -> None:
        """Replace a frozen model by its updated form."""
        self._check_whole()
        self._frozen.update(name, self._params)

    def reset_optimizer(self) -> None:
        """Reset the optimiser's state to its initial value."""
        self._shard = self._shard._replace(opt_state=self._program.optimizer.init(self._shard.params))

    def params(self) -> Params:
        """Return the current parameters on the CPU, possibly as views."""
        self._check_whole()
        params: Params = to_device(self._params, "cpu")
        return params

    def snapshot(self) -> dict[str, Tensor]:
        """Return everything that the next step reads, by dotted name, possibly as views."""
        self._check_whole()
        state = named_state(self._shard.params, self._shard.opt_state, self._frozen.masters, self._layout)
        return {name: leaf.detach().cpu() for name, leaf in state.items()}

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """Continue from a snapshot taken after `version` steps."""
        masters = tree_map(torch.clone, self._frozen.masters)  # which may alias the caller's tensors
        copy_state(named_state(self._shard.params, self._shard.opt_state, masters, self._layout), state)
        self._frozen.replace(masters)
        self._shard, self._updating = self._shard._replace(version=version), False

    def peak_bytes(self) -> int:
        """Return the peak memory of this process in bytes, or 0 if the system does not report it."""
        return peak_bytes(self._device)

    def faults(self) -> list[Fault]:
        """Return no faults, because a single process cannot recover from one."""
        return []

    def _check_whole(self) -> None:
        """Raise RuntimeError if an update stopped half-way, because its parameters must not be used or saved."""
        if self._updating:
            raise RuntimeError("an update failed half-way; restore a snapshot or checkpoint first")

    def _batch(self, batch: Any) -> Any:
        return realign(to_device(batch, self._device))


def named_state(params: Tensor, opt_state: Any, frozen: dict[str, Params], layout: FlatLayout) -> dict[str, Tensor]:
    """Return views of everything that a snapshot holds, by dotted name.

    Args:
        params: [layout.size] flat parameters.
        opt_state: state of the optimiser over `params`.
        frozen: frozen models that are updated.
        layout: layout of the parameters.

    Example:
        >>> from rlhf.tree import flat_layout
        >>> params = {"w": torch.ones(2)}
        >>> layout = flat_layout(params)
        >>> list(named_state(flatten(params, layout), {"step": torch.tensor(0)}, {}, layout))
        ['optimizer.step', 'params.w']
    """
    state = tree_map(lambda leaf: unflatten(leaf, layout) if leaf.ndim else leaf, opt_state)
    return named_leaves({"params": unflatten(params, layout), "optimizer": state, "frozen": frozen})


def copy_state(target: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write a snapshot into the views of `named_state`.

    Args:
        target: the views to write to.
        state: the snapshot.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape. Nothing has been written.

    Example:
        >>> target = {"params.w": torch.zeros(2)}
        >>> copy_state(target, {"params.w": torch.ones(2)})
        >>> target
        {'params.w': tensor([1., 1.])}
    """
    for name in target.keys() | state.keys():
        if name not in target or name not in state:
            raise ValueError(f"{name} is {'missing' if name in target else 'unknown'}")
        if target[name].shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(target[name].shape)}")
    for name, leaf in target.items():
        leaf.copy_(state[name])
