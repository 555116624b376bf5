"""The logs of a run as one record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.field_docs import documented
from rlhf.monitor.log import Series, read_logs


@documented
class RunData(NamedTuple):
    """The logs of a run."""

    metrics: dict[str, dict[str, Series]]
    """Metrics by stage and name: `metrics["ppo"]["objective/kl"]` has the arrays `values` and `steps`. `time` is the
    Unix time of each line, in seconds."""
    events: list[dict[str, Any]]
    """Events in order: start, resume, fault, interrupted, end and others."""
    samples: Sequence[dict[str, Any]]
    """Completions in order, which are read from the file on access."""


def load_run(folder: str | Path) -> RunData:
    """Read the logs of a run, finished or in progress.

    Args:
        folder: output folder of the run, or its logs/.

    Raises:
        UserError: the folder does not belong to a run, or no line can be read.

    Example:
        >>> from rlhf.io.run_log import RunLog
        >>> log = RunLog(Path("outputs/logs"), "ppo", tensorboard=False)  # as rlhf-train does
        >>> log.metrics(1, {"objective/kl": 0.25})
        >>> log.close()
        >>> kl = load_run("outputs").metrics["ppo"]["objective/kl"]
        >>> kl.steps, kl.values
        (array([1]), array([0.25]))
    """
    (reader,) = read_logs([Path(folder)])
    metrics = {
        stage: {name: reader.series(stage, name) for name in (*reader.names(stage), "time")} for stage in reader.stages
    }
    return RunData(metrics, reader.events, reader.samples)
