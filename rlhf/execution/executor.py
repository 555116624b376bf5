"""The executor interface, through which a stage computes, and its in-process form.

A stage describes its work once, as a `Program` of pure functions over micro-batches, and drives it through an
`Executor`, which holds the state. Wherever the micro-batches run, the result has the same bits.
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
from rlhf.execution.update import nonfinite_error, plan_update, step_metrics, sums_of_results
from rlhf.tree import (
    FlatLayout,
    all_finite,
    chunked_squared_norms,
    flat_layout,
    flatten,
    named_leaves,
    realign,
    to_device,
    tree_map,
    tree_sum,
    unflatten,
)
from rlhf.types import Params, Tree


class Fault(NamedTuple):
    """The loss of a process from which the executor recovered."""

    what: str
    """One line for the user."""
    recovery_s: float
    """Seconds until the work continued."""
    final: bool
    """True if no restart is left: the executor continues in this process, and the run should save and end."""


class Executor(Protocol):
    """Runs a program's functions on micro-batches and owns its parameters."""

    @property
    def version(self) -> int:
        """The version of the parameters: optimiser steps applied since the beginning of the run."""

    @property
    def compiled(self) -> bool:
        """True if the steps run as compiled code."""

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """Return `program.eval_fns[name]` of every micro-batch, on the CPU and in order."""

    def step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
        *,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        """Apply one optimiser step on the summed gradient of the micro-batches.

        A step beyond its `StepSpec.limit` changes nothing, `version` included, but returns its metrics.

        Args:
            name: the step's name.
            batches: its micro-batches.
            learning_rate: of this step; None uses the optimiser's schedule.
            overlap: called while workers or a GPU compute the gradients; more than once if a step is repeated.

        Returns:
            Means of the metrics, and `grad_norm`.

        Raises:
            NonFiniteError: a loss or gradient is not finite; nothing has changed.
        """

    def update_frozen(self, name: str) -> None:
        """Replace a frozen model by `program.frozen_updates[name]` of it and the parameters."""

    def reset_optimizer(self) -> None:
        """Replace the optimiser's state by its initial one."""

    def params(self) -> Params:
        """Return the current parameters on the CPU: possibly views, to be read before the next step."""

    def snapshot(self) -> dict[str, Tensor]:
        """Return everything that the next step reads: parameters, optimiser state, frozen models that are updated.

        Keys are dotted names. The tensors are on the CPU and may be views: save or copy them before the next step.
        """

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """Continue from a snapshot taken after `version` steps.

        Raises:
            ValueError: the snapshot is of another program.
        """

    def peak_bytes(self) -> int:
        """Return the peak memory of its largest process in bytes; 0 if the system does not report it."""

    def faults(self) -> list[Fault]:
        """Return the faults since the last call."""


class LocalExecutor:
    """An executor in this process: one shard, micro-batches one after the other."""

    def __init__(self, program: Program, models: ModelState, device: torch.device) -> None:
        """Initialise the state of a program on a device.

        Args:
            program: the functions to run.
            models: the initial parameters and the frozen models.
            device: holds the state and runs the functions.

        Raises:
            ValueError: an optimiser needs whole leaves.
        """
        program.check_optimizers()
        reset_peak(device)
        self._program, self._device = program, device
        self._frozen = FrozenModels(program, to_device(models.frozen, device))
        self._layout = flat_layout(models.params)
        flat = flatten(to_device(models.params, device), self._layout)
        self._shard = init_shard(flat, program.optimizer)
        self._params = unflatten(self._shard.params, self._layout)  # views: every update is visible in them
        self._gradients = make_gradients(program, self._layout)
        self._updating = False  # stays True if an update fails half-way

    @property
    def version(self) -> int:
        """The version of the parameters: optimiser steps applied since the beginning of the run."""
        return self._shard.version

    @property
    def compiled(self) -> bool:
        """True if the steps run as compiled code."""
        return self._program.compile_to is not None

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """See `Executor.map`."""
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
        """See `Executor.step`."""
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
        update = plan_update(sums_of_results(results, spec), squares.cpu(), spec)
        if not update.is_finite:
            raise nonfinite_error(name, batches, results, update, lambda batch: all_finite(gradient(batch)))
        if update.within_limit:
            self._updating = True
            self._shard = apply(self._shard, self.version, slices, update.scale, spec.optimizer, learning_rate)
            self._updating = False
        return step_metrics(results, update)

    def update_frozen(self, name: str) -> None:
        """See `Executor.update_frozen`."""
        self._check_whole()
        self._frozen.update(name, self._params)

    def reset_optimizer(self) -> None:
        """See `Executor.reset_optimizer`."""
        self._shard = self._shard._replace(opt_state=self._program.optimizer.init(self._shard.params))

    def params(self) -> Params:
        """See `Executor.params`."""
        self._check_whole()
        params: Params = to_device(self._params, "cpu")
        return params

    def snapshot(self) -> dict[str, Tensor]:
        """See `Executor.snapshot`."""
        self._check_whole()
        state = named_state(self._shard.params, self._shard.opt_state, self._frozen.masters, self._layout)
        return {name: leaf.detach().cpu() for name, leaf in state.items()}

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """See `Executor.restore`."""
        masters = tree_map(torch.clone, self._frozen.masters)  # which may alias the caller's tensors
        copy_state(named_state(self._shard.params, self._shard.opt_state, masters, self._layout), state)
        self._frozen.replace(masters)
        self._shard, self._updating = self._shard._replace(version=version), False

    def peak_bytes(self) -> int:
        """See `Executor.peak_bytes`."""
        return peak_bytes(self._device)

    def faults(self) -> list[Fault]:
        """Return no faults: a single process survives none."""
        return []

    def _check_whole(self) -> None:
        """Raise RuntimeError if an update stopped half-way: such parameters must be neither used nor saved."""
        if self._updating:
            raise RuntimeError("an update failed half-way: restore a snapshot or checkpoint before anything else")

    def _batch(self, batch: Any) -> Any:
        return realign(to_device(batch, self._device))


def named_state(params: Tensor, opt_state: Any, frozen: dict[str, Params], layout: FlatLayout) -> dict[str, Tensor]:
    """Return views of everything a snapshot holds, by dotted name.

    Args:
        params: [layout.size] flat.
        opt_state: the optimiser's state over `params`.
        frozen: the frozen models that are updated.
        layout: of the parameters.
    """
    state = tree_map(lambda leaf: unflatten(leaf, layout) if leaf.ndim else leaf, opt_state)
    return named_leaves({"params": unflatten(params, layout), "optimizer": state, "frozen": frozen})


def copy_state(target: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write a snapshot into the views of `named_state`.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; nothing was written.
    """
    for name in target.keys() | state.keys():
        if name not in target or name not in state:
            raise ValueError(f"{name} is {'missing' if name in target else 'unknown'}")
        if target[name].shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(target[name].shape)}")
    for name, leaf in target.items():
        leaf.copy_(state[name])
