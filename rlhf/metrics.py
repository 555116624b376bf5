"""The table of metrics, which the log, the terminal, plots, the web page and evaluation tables share.

To add a metric, add a `Metric` to `METRICS`, or call `register` in the file of the stage that logs it. The metric then
has a label and a chart on the page and in the report, and a curve in the plot of that chart. It has a line in
`rlhf-monitor --live` if it has a `short` name, and a row in the table of `rlhf-evaluate`. The health checks named in
`checks` apply to it. A metric that is not registered is shown by its key.
"""

from collections.abc import Iterable
from dataclasses import replace

from rlhf.metric_record import Metric
from rlhf.metric_table import TABLE

__all__ = ["METRICS", "Metric", "describe", "in_order", "is_registered", "register"]


METRICS: dict[str, Metric] = {metric.key: metric for metric in TABLE}
"""Metrics by key, in the order of curves in a chart and of rows in a table."""


def register(metric: Metric) -> None:
    """Add a metric to the end of `METRICS`, for example when the file of a new stage is imported.

    Only programs that import that file know the metric, such as the one that trains the stage and writes its report.

    Args:
        metric: the metric.

    Raises:
        ValueError: the key belongs to another metric.

    Example:
        >>> register(Metric("reward/jokes", "Jokes", unit="per completion", meaning="Jokes told."))
        >>> describe("reward/jokes").label
        'Jokes'
    """
    if METRICS.setdefault(metric.key, metric) != metric:
        raise ValueError(
            f"register: {metric.key} is a metric already, {METRICS[metric.key].label!r}; choose another key"
        )


def is_registered(key: str) -> bool:
    """Return True if the table has a metric with this key, or with a prefix of it.

    Example:
        >>> is_registered("objective/kl"), is_registered("timing_s/generate"), is_registered("my/metric")
        (True, True, False)
    """
    return _row_of(key) is not None


def describe(key: str) -> Metric:
    """Return the metric of a key. The label of a metric that is not registered is its key.

    Example:
        >>> describe("objective/kl").unit, describe("my/metric").label
        ('nats per completion', 'my/metric')
    """
    row = _row_of(key)
    if row is None:
        return Metric(key, key, meaning="A metric of this run.", short=key)
    metric = METRICS[row]
    if not row.endswith("/"):
        return metric
    texts = {name: getattr(metric, name).replace("{}", key[len(row) :]) for name in ("label", "short", "row")}
    return replace(metric, key=key, **texts)


def in_order(keys: Iterable[str]) -> list[str]:
    """Return `keys` in the order of the table. Keys of the same prefix, and unregistered keys, keep their order.

    Example:
        >>> in_order(["my/metric", "objective/kl", "loss/sft"])
        ['loss/sft', 'objective/kl', 'my/metric']
    """
    ranks = {row: rank for rank, row in enumerate(METRICS)}
    return sorted(keys, key=lambda key: ranks.get(_row_of(key) or "", len(ranks)))


def _row_of(key: str) -> str | None:
    """Return the key of the table's row for a metric: the key itself or its longest prefix; None if there is none."""
    if key in METRICS and not key.endswith("/"):
        return key
    parts = key.split("/")
    prefixes = ("/".join(parts[:count]) + "/" for count in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in METRICS), None)
