"""Constant models of one process: as functions compute with them, and those that change as they are kept."""

from rlhf.execution.program import Program
from rlhf.tree import realign
from rlhf.types import FrozenParams, Params


class FrozenModels:
    """A program's frozen models, prepared once for all micro-batches.

    A model that is updated keeps its float32 parameters beside: updates and snapshots are of these.
    """

    def __init__(self, program: Program, models: FrozenParams) -> None:
        """Take over `models`, float32, by name."""
        self._program = program
        self.prepared: FrozenParams = {}
        self.changing: FrozenParams = {}
        self.replace(models)

    def replace(self, models: FrozenParams) -> None:
        """Put models, float32, in the places of those of their names."""
        for name, model in realign(models).items():
            self.prepared[name] = self._program.prepare_frozen(name, model)
            if name in self._program.frozen_updates:
                self.changing[name] = model

    def update(self, name: str, params: Params) -> None:
        """Replace a model by `program.frozen_updates[name]` of it and the parameters."""
        self.replace({name: self._program.frozen_updates[name](self.changing[name], params)})
