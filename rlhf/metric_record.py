"""The record of a metric: its names, unit, chart and meaning."""

from dataclasses import dataclass
from typing import Literal

from rlhf.field_docs import documented

Direction = Literal["up", "down", "none"]


@documented
@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, or all metrics of a prefix if the key ends with `/`. `{}` in texts stands for the rest of the key."""

    key: str
    """Name in the log, such as `objective/kl`, or a prefix that ends with `/`."""
    label: str
    """Name on the page and in plots."""
    unit: str = ""
    """Unit. The page shows metrics with a unit that begins with `share` in per cent."""
    direction: Direction = "none"
    """Direction of better values; `none` if neither is better."""
    chart: str = ""
    """Chart of `rlhf.monitor.charts`, or the title of a new one. If empty, the metric has a chart of its own."""
    meaning: str = ""
    """Definition in one sentence."""
    good: str = ""
    """Expected course in a good run."""
    short: str = ""
    """Name in the terminal, at most 16 columns wide. If empty, the metric is not shown there."""
    row: str = ""
    """Name in evaluation tables, if it differs from the label."""
    low: float | None = None
    """Lower bound of the quantity, which intervals keep to; None if there is none. An estimate may lie below."""
    high: float | None = None
    """Upper bound of the quantity, which intervals keep to; None if there is none. An estimate may lie above."""
    signed: bool = False
    """True to show the sign of positive values in evaluation tables."""
    headline: bool = False
    """True to show the metric among the key figures of the page."""
    checks: tuple[str, ...] = ()
    """Names of the health checks (`rlhf.monitor.health.CHECKS`) that apply to the metric."""
