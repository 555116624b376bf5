"""The record of one metric, of which `rlhf.metrics` has the table."""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down", "none"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, or (key with a final `/`) all metrics of that prefix; `{}` in its texts stands for the rest."""

    key: str
    label: str
    """Name on the page and in plots."""
    unit: str = ""
    """Unit; the page shows a unit that begins with `share` in per cent."""
    direction: Direction = "none"
    """Direction of better values; `none` if neither is better."""
    chart: str = ""
    """Chart of `rlhf.monitor.charts`, or the title of a new one; if empty, a chart with this metric only."""
    meaning: str = ""
    good: str = ""
    """Expected course of a good run."""
    short: str = ""
    """Name in the terminal, at most 16 columns; if empty, the metric is not shown there."""
    row: str = ""
    """Name in evaluation tables, if it differs from the label."""
    low: float | None = None
    high: float | None = None
    """Bounds of the possible values; None if unbounded."""
    signed: bool = False
    """Evaluation tables show the sign of positive values."""
    headline: bool = False
    """Shown among the key figures of the page's overview."""
    checks: tuple[str, ...] = ()
    """Names of the health checks (`rlhf.monitor.health.CHECKS`) that judge it."""
