"""Where pure functions meet state: the interface through which a stage computes, and its in-process form.

A stage describes its work once, as a `Program` of pure functions over micro-batches, and drives it through an
`Executor`. It does not know where the micro-batches run: the result has the same bits wherever they do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad_and_value

from rlhf.distributed.server import apply, init_shard, square_sums, update_scale
from rlhf.errors import NonFiniteError
from rlhf.ops import mean_metrics
from rlhf.optim import Optimizer
from rlhf.tree import (
    all_finite,
    flat_layout,
    flatten,
    named_leaves,
    to_device,
    tree_map,
    tree_sum,
    unflatten,
)
from rlhf.types import Metrics, Params, Tree


class StepSpec(NamedTuple):
    """How one kind of optimiser step is made."""

    objective: Callable[[Params, dict[str, Params], Any], tuple[Tensor, Metrics]]
    """(params, frozen, micro-batch) -> (loss sum, metric sums with `count`)."""
    optimizer: Optimizer
    """Element-wise; all steps of a program share its state."""
    max_grad_norm: float
    """Of the mean gradient; inf is off."""


class Program(NamedTuple):
    """A stage's work as pure functions."""

    params: Params
    """Where training starts, float32."""
    frozen: dict[str, Params]
    """Constant models by name."""
    steps: dict[str, StepSpec]
    """Optimiser steps by name."""
    maps: dict[str, Callable[[Params, dict[str, Params], Any], Tree]]
    """(params, frozen, micro-batch) -> any tree of tensors, by name."""
    blends: dict[str, Callable[[Params, Params], Params]]
    """(frozen model, params) -> its new value, by the frozen model's name (a reference that follows the policy)."""


class Executor(Protocol):
    """Runs a program's functions on micro-batches and owns its parameters."""

    @property
    def version(self) -> int:
        """Optimiser steps applied since the beginning of the run: the version of the parameters."""

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """Run `program.maps[name]` on every micro-batch; results on the CPU, in order."""

    def step(self, name: str, batches: Sequence[Any]) -> dict[str, float]:
        """Apply one optimiser step on the summed gradient of the micro-batches; means of the metrics, `grad_norm`.

        Raises NonFiniteError, and changes nothing, if a loss or gradient is not finite.
        """

    def blend(self, name: str) -> None:
        """Replace a frozen model by `program.blends[name]` of it and the parameters."""

    def reset_optimizer(self) -> None:
        """Start the optimiser's state anew."""

    def params(self) -> Params:
        """The present parameters, on the CPU; not to be changed."""

    def snapshot(self) -> dict[str, Tensor]:
        """Everything that the next step reads, by dotted name, on the CPU: parameters, optimiser, blended models."""

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """Continue from a snapshot taken after `version` steps."""


class LocalExecutor:
    """Everything in this process: one shard, micro-batches one after the other."""

    def __init__(self, program: Program, device: torch.device) -> None:
        """Take over a program's parameters; `device` is where all of it lives and runs."""
        self._program, self._device = program, device
        self._frozen = to_device(program.frozen, device)
        self._layout = flat_layout(program.params)
        flat = flatten(to_device(program.params, device), self._layout)
        self._shard = init_shard(flat, self._optimizer())
        self._params = unflatten(self._shard.params, self._layout)  # views: every update shows in them
        self._gradients = {name: grad_and_value(spec.objective, has_aux=True) for name, spec in program.steps.items()}

    @property
    def version(self) -> int:
        """Optimiser steps applied since the beginning of the run: the version of the parameters."""
        return self._shard.version

    def map(self, name: str, batches: Sequence[Any]) -> list[Tree]:
        """See `Executor.map`."""
        function = self._program.maps[name]
        with torch.no_grad():
            return [
                to_device(function(self._params, self._frozen, to_device(batch, self._device)), "cpu")
                for batch in batches
            ]

    def step(self, name: str, batches: Sequence[Any]) -> dict[str, float]:
        """See `Executor.step`."""
        spec, results = self._program.steps[name], []

        def gradient(batch: Any) -> Tensor:
            gradients, result = self._gradients[name](self._params, self._frozen, to_device(batch, self._device))
            results.append(result)
            return flatten(gradients, self._layout)

        gradient_sum = tree_sum(gradient(batch) for batch in batches)
        loss, sums = tree_sum(results)
        metrics = {key: float(value) for key, value in mean_metrics(sums).items()}
        scale, norm = update_scale(square_sums(gradient_sum), float(sums["count"]), spec.max_grad_norm)
        if not (math.isfinite(norm) and all_finite(loss)):
            finite = (
                all_finite(result) and all_finite(gradient(batch))
                for batch, result in zip(batches, results[:], strict=True)
            )
            offender = next((number for number, fine in enumerate(finite) if not fine), 0)
            raise NonFiniteError(
                f"{name}: loss {float(loss):g}, gradient norm {norm:g} in micro-batch {offender}", batches[offender]
            )
        self._shard = apply(self._shard, self.version, gradient_sum, scale, spec.optimizer, self._layout)
        return metrics | {"grad_norm": norm}

    def blend(self, name: str) -> None:
        """See `Executor.blend`."""
        self._frozen[name] = self._program.blends[name](self._frozen[name], self._params)

    def reset_optimizer(self) -> None:
        """See `Executor.reset_optimizer`."""
        self._shard = self._shard._replace(opt_state=self._optimizer().init(self._shard.params))

    def params(self) -> Params:
        """See `Executor.params`."""
        params: Params = to_device(self._params, "cpu")
        return params

    def snapshot(self) -> dict[str, Tensor]:
        """See `Executor.snapshot`."""
        return {name: leaf.detach().cpu() for name, leaf in self._state().items()}

    def restore(self, state: dict[str, Tensor], version: int) -> None:
        """See `Executor.restore`."""
        own = self._state()
        for name in own.keys() | state.keys():
            if name not in own or name not in state:
                raise ValueError(f"{name} is {'missing' if name in own else 'unknown'}")
            if own[name].shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}")
        for name in self._program.blends:  # may alias the program's own tensors: replaced, not written into
            self._frozen[name] = tree_map(torch.clone, self._frozen[name])
        for name, leaf in self._state().items():
            leaf.copy_(state[name])
        self._shard = self._shard._replace(version=version)

    def _optimizer(self) -> Optimizer:
        """That of the first step; a program without steps (evaluation) never uses its state."""
        specs = list(self._program.steps.values())
        return (
            specs[0].optimizer if specs else Optimizer(lambda params: (), lambda grads, state, params: (params, state))
        )

    def _state(self) -> dict[str, Tensor]:
        """Views of everything a snapshot holds, by name."""
        opt_state = tree_map(lambda leaf: unflatten(leaf, self._layout) if leaf.ndim else leaf, self._shard.opt_state)
        blended = {name: self._frozen[name] for name in self._program.blends}
        return named_leaves({"params": self._params, "optimizer": opt_state, "frozen": blended})
