"""A run's log as JSON values for the page: its state, findings and thinned curves."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.io.paths import short_names
from rlhf.metrics import in_order
from rlhf.monitor.charts import charts
from rlhf.monitor.compare import comparison
from rlhf.monitor.health import findings
from rlhf.monitor.log import LogReader, Series
from rlhf.monitor.run_facts import SETUP, described, evaluation_of, setup_of, verdicts_of

Curve = dict[str, Any]
"""A curve as JSON values: `steps`, `mean` and the `last` step. If values were merged, also the lowest and the highest
value of each point, `low` and `high`, and the number of values in it, `weight`."""

POINTS = 1000
"""Maximum number of points of a curve, which exceeds the columns that a screen has for it."""

_EVENTS = 300
"""Maximum number of events on the page, which are the newest."""


def run_names(readers: Sequence[LogReader]) -> list[str]:
    """Return a unique name for each run: the end of its output folder's path, as long as needed."""
    folders = [reader.folder.absolute() for reader in readers]
    return short_names([folder.parent if folder.name == "logs" else folder for folder in folders])


def run_state(reader: LogReader, name: str) -> dict[str, Any]:
    """Return the state of a run: everything except curves and samples."""
    return {
        "name": name,
        "folder": str(reader.folder),
        "generation": reader.generation,
        "stages": [_stage_state(reader, stage) for stage in reader.stages],
        "events": [_without_setup(event) for event in reader.events[-_EVENTS:]],
        "setup": {stage: setup_of(reader, stage) for stage in reader.stages},
        "verdicts": verdicts_of(reader),
        "evaluation": evaluation_of(reader),
        "problems": reader.problems,
        "findings": [finding._asdict() for finding in findings(reader)],
        "samples": len(reader.samples),
    }


def metric_table(readers: Sequence[LogReader]) -> dict[str, Any]:
    """Return the runs' metrics and charts, each in the order of their table, as JSON values for the page."""
    names = list(dict.fromkeys(name for reader in readers for stage in reader.stages for name in reader.names(stage)))
    return {
        "metrics": {name: dataclasses.asdict(described(readers, name)) for name in in_order(names)},
        "charts": [chart._asdict() for chart in charts(names).values()],
        "comparison": comparison(readers),
    }


def _without_setup(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in SETUP}


def _stage_state(reader: LogReader, stage: str) -> dict[str, Any]:
    progress = reader.progress(stage)
    return {"name": stage, "metrics": reader.names(stage)} | {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in progress._asdict().items()
    }


def stage_curves(
    reader: LogReader, stage: str, *, first: int = 0, last: int | None = None, points: int = POINTS
) -> dict[str, Curve]:
    """Return all metrics of a stage as curves, by name.

    Args:
        reader: log of the run.
        stage: name of the stage.
        first: first step.
        last: last step; None stands for the newest.
        points: maximum number of points of each curve.
    """
    return {name: thin(_between(reader.series(stage, name), first, last), points) for name in reader.names(stage)}


def _between(series: Series, first: int, last: int | None) -> Series:
    begin = int(np.searchsorted(series.steps, first, side="left"))
    end = len(series.steps) if last is None else int(np.searchsorted(series.steps, last, side="right"))
    return Series(series.steps[begin:end], series.values[begin:end])


def thin(series: Series, points: int) -> Curve:
    """Return a curve of at most `points` points.

    Neighbours are merged into their mean, with the lowest and highest beside it, so that no spike is lost.
    """
    count, last = len(series.steps), int(series.steps[-1]) if len(series.steps) else -1
    if count <= points:
        return {"steps": series.steps.tolist(), "mean": _plain(series.values), "last": last}
    weight = math.ceil(count / points)
    starts = np.arange(0, count, weight)
    known = np.add.reduceat(np.isfinite(series.values).astype(np.int64), starts)
    total = np.add.reduceat(np.nan_to_num(series.values), starts)
    mean = np.where(known > 0, total / np.maximum(known, 1), np.nan)
    ends = np.append(starts[1:], count) - 1
    return {
        "steps": ((series.steps[starts] + series.steps[ends]) / 2).tolist(),
        "mean": _plain(mean),
        "low": _plain(np.fmin.reduceat(series.values, starts)),
        "high": _plain(np.fmax.reduceat(series.values, starts)),
        "weight": weight,
        "last": last,
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Round values to six significant digits; None for NaN."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
