"""Frozen models of one process, in the form that functions compute with."""

from rlhf.execution.program import Program
from rlhf.tree import realign
from rlhf.types import FrozenParams, Params


class FrozenModels:
    """Frozen models of a program, prepared once for all micro-batches.

    A model that the program updates also keeps its float32 master parameters, which updates and snapshots use.
    """

    def __init__(self, program: Program, models: FrozenParams) -> None:
        """Prepare `models`, given in float32 by name."""
        self._program = program
        self.prepared: FrozenParams = {}
        self.masters: FrozenParams = {}
        self.replace(models)

    def replace(self, models: FrozenParams) -> None:
        """Replace the models of the same names by `models`, given in float32."""
        for name, model in realign(models).items():
            self.prepared[name] = self._program.prepare_frozen(name, model)
            if name in self._program.frozen_updates:
                self.masters[name] = model

    def update(self, name: str, params: Params) -> None:
        """Replace a model by the result of `program.frozen_updates[name]` on it and the parameters."""
        self.replace({name: self._program.frozen_updates[name](self.masters[name], params)})
