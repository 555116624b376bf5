"""Where pure functions meet state: the interface through which a stage computes, and its in-process form.

A stage describes its work once, as a `Program` of pure functions over micro-batches, and drives it through an
`Executor`. It does not know where the micro-batches run: the result has the same bits wherever they do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.errors import NonFiniteError
from rlhf.execution.frozen import FrozenModels
from rlhf.execution.gradients import make_gradients
from rlhf.execution.memory import peak_bytes, reset_peak
from rlhf.execution.program import ModelState, Program, StepSpec
from rlhf.execution.shard import apply, init_shard, slice_shard, update_scale
from rlhf.ops import mean_metrics
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
    """Something that went wrong with a process and was made good."""

    what: str
    """One line for the user."""
    recovery_s: float
    """Seconds until the work went on."""
    final: bool
    """No restart is left: the executor finishes in this process, and the run should save and end."""


class Executor(Protocol):
    """Runs a program's functions on micro-batches and owns its parameters."""

    @property
    def version(self) -> int:
        """Optimiser steps applied since the beginning of the run: the version of the parameters."""

    @property
    def compiled(self) -> bool:
        """Whether its steps run as compiled code."""

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """Run `program.eval_fns[name]` on every micro-batch; results on the CPU, in order."""

    def step(
        self,
        name: str,
        batches: Sequence[Any],
        learning_rate: float | None = None,
        *,
        overlap: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        """Apply one optimiser step on the summed gradient of the micro-batches; means of the metrics, `grad_norm`.

        A step beyond its `StepSpec.limit` changes nothing, `version` included; its metrics are returned all the same.

        Args:
            name: of the step.
            batches: its micro-batches.
            learning_rate: of this step; None takes that of the optimiser's schedule.
            overlap: called while others, or a GPU, compute the gradients; more than once where a step is repeated.

        Raises:
            NonFiniteError: a loss or gradient is not finite; nothing has changed.
        """

    def update_frozen(self, name: str) -> None:
        """Replace a frozen model by `program.frozen_updates[name]` of it and the parameters."""

    def reset_optimizer(self) -> None:
        """Start the optimiser's state anew."""

    def params(self) -> Params:
        """The present parameters, on the CPU: perhaps views, which are not to be changed and which a step changes."""

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that the next step reads, by dotted name, on the CPU: parameters, optimiser, blended models.

        Views as `params` are: to be saved or copied before the next step.
        """

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """Continue from a snapshot taken after `version` steps.

        Raises:
            ValueError: the snapshot is of another program.
        """

    def peak_bytes(self) -> int:
        """The most memory that one of its processes ever held; 0 where the system does not tell."""

    def faults(self) -> list[Fault]:
        """What went wrong since the last call."""


class LocalExecutor:
    """Everything in this process: one shard, micro-batches one after the other."""

    def __init__(self, program: Program, models: ModelState, device: torch.device) -> None:
        """Take over a program and its models; `device` is where all of it lives and runs.

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
        self._params = unflatten(self._shard.params, self._layout)  # views: every update shows in them
        self._gradients = make_gradients(program, self._layout)
        self._updating = False  # True for good where an update fails half-way

    @property
    def version(self) -> int:
        """Optimiser steps applied since the beginning of the run: the version of the parameters."""
        return self._shard.version

    @property
    def compiled(self) -> bool:
        """Whether its steps run as compiled code."""
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
        pieces = slice_shard(self._shard, gradient_sum, spec.optimizer, self._layout)
        overlap()
        results = to_device(results, "cpu")  # here alone a GPU is waited for: it applies the update while we go on
        update = plan_update(sums_of_results(results, spec), squares.cpu(), spec)
        if not update.finite:
            raise not_finite(name, batches, results, update, lambda batch: all_finite(gradient(batch)))
        if update.allowed:
            self._updating = True
            self._shard = apply(self._shard, self.version, pieces, update.scale, spec.optimizer, learning_rate)
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
        state = named_state(self._shard.params, self._shard.opt_state, self._frozen.changing, self._layout)
        return {name: leaf.detach().cpu() for name, leaf in state.items()}

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """See `Executor.restore`."""
        changing = tree_map(torch.clone, self._frozen.changing)  # which may alias the models' own tensors
        copy_state(named_state(self._shard.params, self._shard.opt_state, changing, self._layout), state)
        self._frozen.replace(changing)
        self._shard, self._updating = self._shard._replace(version=version), False

    def peak_bytes(self) -> int:
        """See `Executor.peak_bytes`."""
        return peak_bytes(self._device)

    def faults(self) -> list[Fault]:
        """See `Executor.faults`: one process has none that it outlives."""
        return []

    def _check_whole(self) -> None:
        """Raise RuntimeError if the parameters are of no version, which must neither be used nor saved."""
        if self._updating:
            raise RuntimeError("an update failed half-way: restore a snapshot or checkpoint before anything else")

    def _batch(self, batch: Any) -> Any:
        return realign(to_device(batch, self._device))


class Update(NamedTuple):
    """What is done with the summed gradient of a step's micro-batches."""

    scale: float
    """Turns it into the clipped mean gradient."""
    grad_norm: float
    """Of the mean gradient, before clipping."""
    finite: bool
    """Whether every loss and the gradient are; otherwise the step is refused with an error."""
    allowed: bool
    """Whether the step is within its limit; otherwise it is passed over."""


def sums_of_results(results: Sequence[Any], spec: StepSpec) -> Tensor:
    """[M, 3] float64 on the CPU: each micro-batch's loss, count and limited metric (0 where there is no limit).

    Args:
        results: (loss sum, metric sums with `count`) of each.
        spec: of the step.
    """
    rows = []
    for loss, metrics in results:
        limited = float(metrics[spec.limit.metric]) if spec.limit else 0.0
        rows.append([float(loss), float(metrics["count"]), limited])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def plan_update(table: Tensor, squares: Tensor, spec: StepSpec) -> Update:
    """Decide about a step. All who own a part of the parameters decide alike, from the same numbers.

    Args:
        table: [M, 3], `sums_of_results` of all micro-batches.
        squares: [chunks] float64, `rlhf.tree.chunked_squared_norms` of the summed gradient.
        spec: of the step.
    """
    _, count, limited = tree_sum(table).tolist()
    scale, norm = update_scale(squares, count, spec.max_grad_norm)
    allowed = spec.limit is None or limited / (count or 1.0) <= spec.limit.most
    return Update(scale, norm, math.isfinite(norm) and all_finite(table), allowed)


def step_metrics(results: Sequence[Any], update: Update) -> dict[str, float]:
    """Means of the micro-batches' metric sums, and `grad_norm`."""
    _, sums = tree_sum(results)
    return {name: float(mean) for name, mean in mean_metrics(sums).items()} | {"grad_norm": update.grad_norm}


def not_finite(
    name: str, batches: Sequence[Any], results: Sequence[Any], update: Update, is_finite: Callable[[Any], bool]
) -> NonFiniteError:
    """The error of a refused step, with the offending micro-batch.

    Args:
        name: of the step.
        batches: its micro-batches.
        results: of each, as in `sums_of_results`.
        update: what was decided.
        is_finite: whether loss, metrics and gradient of one micro-batch are.
    """
    loss, _ = tree_sum(results)
    offender = next((number for number, batch in enumerate(batches) if not is_finite(batch)), 0)
    message = f"{name}: loss {float(loss):g}, gradient norm {update.grad_norm:g} in micro-batch {offender}"
    return NonFiniteError(message, batches[offender])


def named_state(params: Tensor, opt_state: Any, blended: dict[str, Params], layout: FlatLayout) -> dict[str, Tensor]:
    """Views of everything a snapshot holds, by name.

    Args:
        params: [layout.size] flat.
        opt_state: of the optimiser over `params`.
        blended: the frozen models that change.
        layout: of the parameters.
    """
    state = tree_map(lambda leaf: unflatten(leaf, layout) if leaf.ndim else leaf, opt_state)
    return named_leaves({"params": unflatten(params, layout), "optimizer": state, "frozen": blended})


def copy_state(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Write a snapshot into the views of `named_state`.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; nothing was written.
    """
    for name in own.keys() | state.keys():
        if name not in own or name not in state:
            raise ValueError(f"{name} is {'missing' if name in own else 'unknown'}")
        if own[name].shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}")
    for name, leaf in own.items():
        leaf.copy_(state[name])
