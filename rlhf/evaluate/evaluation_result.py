"""The result of one evaluation, and its JSON form."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.evaluate.estimates import Figure
from rlhf.evaluate.evaluation_inputs import TestData
from rlhf.io.paths import short_names


class Evaluation(NamedTuple):
    """Figures about one file of test data."""

    kind: str
    """sft, reward or policy."""
    models: dict[str, Path]
    """Folders by role."""
    data: TestData
    unit: str
    """Samples of the figures: records, pairs, prompts."""
    figures: dict[str, dict[str, Figure]]
    """Figures by column, which is a model or the difference of two models, and by name."""
    facts: dict[str, Any]
    """Other plain values: counts, settings, curves."""

    verdict: str = ""
    """One sentence on the figures."""

    @property
    def against(self) -> str:
        """The name of the model that the policy is compared with; empty without one."""
        if "against" not in self.models:
            return ""
        return short_names([self.models["policy"], self.models["against"]])[1]

    def plain(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return {
            "eval_type": self.kind,
            "models": {role: str(folder) for role, folder in self.models.items()},
            "data": str(self.data.path),
            **({"data_origin": self.data.origin} if self.data.origin else {}),
            **self.facts,
            "unit": self.unit,
            "verdict": self.verdict,
            "figures": {
                column: {name: plain(figure) for name, figure in figures.items()}
                for column, figures in self.figures.items()
            },
        }


def plain(figure: Figure) -> dict[str, Any]:
    """Return a figure as JSON values; what is not finite is null."""
    return {name: value if math.isfinite(value) else None for name, value in figure._asdict().items()}
