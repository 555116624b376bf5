"""Measurements of the health checks in a stage's events and in whether its metrics are finite."""

import numpy as np

from rlhf.metrics import describe
from rlhf.monitor.diagnostics import Reading
from rlhf.monitor.log import AFTERWARDS, LogReader

_NEWEST = 5
"""Number of newest lines that must be finite."""


def recoveries(reader: LogReader, stage: str) -> Reading:
    """Return the faults in which workers were lost and replaced."""
    faults = [event for event in reader.events if event["stage"] == stage and event["event"] == "fault"]
    if not faults:
        return Reading("ok", "no worker was lost", "no fault event")
    seconds = sum(float(fault["recovery_s"]) for fault in faults if isinstance(fault.get("recovery_s"), int | float))
    steps = [fault["step"] for fault in faults if "step" in fault] or [0]
    final = any(fault.get("final") for fault in faults) and reader.progress(stage).state == "interrupted"
    return Reading(
        "problem" if final else "warning",
        f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'}, made good in {seconds:.1f} s"
        + (", then no more were allowed" if final else ""),
        "; ".join(f"step {fault.get('step', '?')}: lost {fault.get('what', '?')}" for fault in faults[-3:]),
        (min(steps), max(steps)),
    )


def not_finite(reader: LogReader, stage: str) -> Reading:
    """Return the updates that were refused for NaN or infinity, and the metrics that are not finite."""
    events = [event for event in reader.events if event["stage"] == stage and event["event"] not in AFTERWARDS]
    refused = [event for event in events if event["event"] == "nonfinite"]
    if refused:
        step = refused[-1].get("step", 0) + 1
        stands = events[-1] is refused[-1]
        summary = f"an update was refused at step {step}" + (", and the run went on since" if not stands else "")
        return Reading("problem" if stands else "warning", summary, str(refused[-1].get("message", "")), (step, step))
    names = [
        name for name in reader.names(stage) if describe(name).unit != "correlation"
    ]  # undefined if nothing varies
    bad = [name for name in names if np.isnan(reader.series(stage, name).values[-_NEWEST:]).any()]
    if not bad:
        return Reading("ok", "all figures are finite", "no nonfinite event, no null in the newest lines")
    return Reading(
        "warning",
        f"{len(bad)} {'metric is' if len(bad) == 1 else 'metrics are'} not finite",
        "null in the newest lines: " + ", ".join(bad[:5]),
    )
