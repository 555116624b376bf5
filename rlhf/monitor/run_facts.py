"""Facts of a run beside its metrics: settings, provenance, units and verdicts from the log, and its evaluation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf.errors import UserError
from rlhf.io.files import read_json
from rlhf.metrics import Metric, describe
from rlhf.monitor.log import LogReader

SETUP = ("settings", "provenance", "units")
"""Fields of start events that are shown in a place of their own instead of in the list of events."""


def setup_of(reader: LogReader, stage: str) -> dict[str, dict[str, Any]]:
    """Return the settings, provenance and units of the newest start of a stage; empty where the log is older."""
    found: dict[str, dict[str, Any]] = {name: {} for name in SETUP}
    for event in reader.events:
        if event["stage"] == stage and event["event"] in ("start", "resume"):
            found |= {name: event[name] for name in SETUP if event.get(name)}
    return found


def settings_of_run(reader: LogReader) -> dict[str, Any]:
    """Return the facts that distinguish a run from others: its settings except the seed, and the digests of its data.

    Models are left out, because those that a stage starts from differ between seeds.
    """
    values: dict[str, Any] = {}
    for stage in reader.stages:
        setup = setup_of(reader, stage)
        digests = setup["provenance"].get("digests", {})
        values |= {name: value for name, value in setup["settings"].items() if name != "seed"}
        values |= {f"{stage} {name}": str(digests[name])[:8] for name in ("data", "validation") if digests.get(name)}
        if isinstance(sources := digests.get("sources"), list):
            values["ppo.reward"] = " ".join(_source_name(source) for source in sources)
    return values


def _source_name(source: dict[str, Any]) -> str:
    """Return a reward source without the folder of its model, which differs between seeds."""
    target = source.get("function") or "reward model"
    weight = source.get("weight", 1)
    return str(target) if weight == 1 else f"{weight:g}*{target}"


def verdicts_of(reader: LogReader) -> dict[str, dict[str, Any]]:
    """Return the newest verdict of each stage, by stage: its text, and whether it is sound."""
    return {
        event["stage"]: {"text": event.get("text", ""), "sound": event.get("sound", True)}
        for event in reader.events
        if event["event"] == "verdict"
    }


def described(readers: Sequence[LogReader], name: str) -> Metric:
    """Return a metric, with the unit that all of the runs log for it if that differs from the table's."""
    metric = describe(name)
    units = {
        setup_of(reader, stage)["units"].get(name, metric.unit)
        for reader in readers
        for stage in reader.stages
        if name in reader.names(stage)
    }
    return dataclasses.replace(metric, unit=units.pop()) if len(units) == 1 else metric


def evaluation_of(reader: LogReader) -> dict[str, Any]:
    """Return report/evaluation.json of a run; empty if there is none that can be read."""
    path = reader.folder.absolute().parent / "report" / "evaluation.json"
    try:
        content = read_json(path) if path.is_file() else {}
    except UserError:
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("evaluations"), list) else {}
