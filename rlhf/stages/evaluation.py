"""What every kind of evaluation shares: where it computes, and what comes out."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.config import ComputeConfig
from rlhf.distributed import connected, open_executor
from rlhf.distributed.executor import Executor, Models, Program
from rlhf.io.progress import console
from rlhf.stages.compute import compute_threads, describe_workers, find_device, limit_threads
from rlhf.stages.evaluate_inputs import TestData
from rlhf.stages.figures import Figure


class Evaluation(NamedTuple):
    """Figures about one file of test data."""

    kind: str
    """sft, reward or policy."""
    models: dict[str, Path]
    """Folders by the part they play."""
    data: TestData
    unit: str
    """What the figures count as samples: records, pairs, prompts."""
    figures: dict[str, dict[str, Figure]]
    """By column (a model, or the difference of two) and by name."""
    facts: dict[str, Any]
    """Other plain values: counts, settings, curves."""

    def plain(self) -> dict[str, Any]:
        """It as JSON values."""
        return {
            "eval_type": self.kind,
            "models": {part: str(folder) for part, folder in self.models.items()},
            "data": str(self.data.path),
            **({"data_origin": self.data.origin} if self.data.origin else {}),
            **self.facts,
            "unit": self.unit,
            "figures": {column: {name: plain(f) for name, f in of.items()} for column, of in self.figures.items()},
        }


def plain(figure: Figure) -> dict[str, Any]:
    """A figure as JSON values; what is not finite is null."""
    return {name: value if math.isfinite(value) else None for name, value in figure._asdict().items()}


class Workplace(NamedTuple):
    """Where the models run."""

    config: ComputeConfig
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the models' passes."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def open_executor(
        self, make_program: Callable[[], Program], models: Models
    ) -> contextlib.AbstractContextManager[Executor]:
        """The executor that the configuration asks for, until the block ends; arguments as `rlhf.distributed`'s."""
        return open_executor(make_program, models, self.config.dist, device=self.device, tell=tell)


@contextlib.contextmanager
def open_workplace(config: ComputeConfig) -> Iterator[Workplace]:
    """Set up device, threads and Ray.

    Raises:
        UserError: there is no such device, or the cluster cannot be reached.
    """
    device = find_device(config.device)
    if config.dist.num_workers:
        tell(describe_workers(config.dist))
    with limit_threads(compute_threads(config)), connected(config.dist):
        yield Workplace(config, device)


def tell(text: str) -> None:
    """Say one line to the user."""
    console.print(text, markup=False, soft_wrap=True)
