"""Observers of the training loop: the log, checkpoints, progress displays and callbacks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.config import RunConfig
from rlhf.field_docs import documented
from rlhf.io.provenance import Provenance
from rlhf.io.run_log import FORMAT, RunLog
from rlhf.stages import Stage
from rlhf.train.sink import open_sink
from rlhf.verdicts import Verdict

LoopState = dict[str, Any]
"""JSON values that the next step reads besides the executor's state, and that a checkpoint contains."""


@documented
class StageStart(NamedTuple):
    """Start of the training of a stage, or of its continuation."""

    stage: Stage
    """The stage."""
    config: RunConfig
    """Configuration of the run."""
    step: int
    """Number of steps made by the run that is continued; 0 for a new run."""
    total: int
    """Number of steps of the whole run."""
    notes: tuple[str, ...]
    """Lines that have been shown to the user."""
    settings: Mapping[str, Any] | None = None
    """Settings that determine the results of the stage, as resolved."""
    provenance: Provenance | None = None
    """Provenance of the run."""
    units: Mapping[str, str] | None = None
    """Units of metrics for which this run differs from `rlhf.metrics`."""


class Observer:
    """Base class of observers of the training loop, whose methods do nothing.

    Observers are called in order, and in reverse order at the end. An exception ends the run.

    Example:
        >>> class Printer(Observer):
        ...     def on_step(self, step, metrics):
        ...         print(step, metrics)
        ...         return False
        >>> Printer().on_step(1, {"loss/sft": 2.5})
        1 {'loss/sft': 2.5}
        False
    """

    def on_start(self, start: StageStart) -> None:
        """Called before the first step."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Called after step number `step`, counted from 1. If the result is True, the run saves its state and stops."""
        return False

    def on_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Called with completions of a step."""

    def on_event(self, name: str, values: Mapping[str, Any]) -> None:
        """Called for any other event: fault, nonfinite, failed, interrupted or end."""

    def on_save(self, step: int, state: LoopState) -> None:
        """Called after `step` steps, to save the state."""

    def on_end(self, error: BaseException | None) -> None:
        """Called when the loop ends, with the exception that ended it, or None."""

    def on_verdict(self, verdict: Verdict) -> None:
        """Called with the verdict on the stage's model, after `on_end`, if there is one."""


class Observers:
    """A sequence of observers, which are called one after the other."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    @contextlib.contextmanager
    def observe(self, start: StageStart) -> Iterator[None]:
        """Call `on_start` of all observers, and at the end of the block `on_end` of those that were started."""
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                observer.on_start(start)
                stack.push(_exit_callback(observer))
            yield

    def step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Call `on_step` of all observers, and return True if one of them stops the run."""
        stops = [observer.on_step(step, metrics) for observer in self._observers]
        return any(stops)

    def samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Call `on_samples` of all observers."""
        for observer in self._observers:
            observer.on_samples(step, samples)

    def event(self, name: str, **values: Any) -> None:
        """Call `on_event` of all observers."""
        for observer in self._observers:
            observer.on_event(name, values)

    def save(self, step: int, state: LoopState) -> None:
        """Call `on_save` of all observers."""
        for observer in self._observers:
            observer.on_save(step, state)


def _exit_callback(observer: Observer) -> Callable[[Any, BaseException | None, Any], bool]:
    def on_exit(error_type: Any, error: BaseException | None, traceback: Any) -> bool:
        observer.on_end(error)
        return False

    return on_exit


class LogWriter(Observer):
    """Writes metrics, samples and events to logs/."""

    def on_start(self, start: StageStart) -> None:
        """Open the log. Lines after the step from which the run continues are removed."""
        config = start.config
        self._every, self._total = config.log.every, start.total
        self._log = RunLog(
            config.output_dir / "logs",
            start.stage.name,
            after_step=start.step if config.resume else None,
            tensorboard=config.log.tensorboard,
            sink=open_sink(config.log.sink),
        )
        self._log.event(
            "resume" if start.step else "start",
            format=FORMAT,
            step=start.step,
            total=start.total,
            unit=start.stage.unit,
            notes=list(start.notes),
            settings=dict(start.settings or {}),
            provenance=start.provenance or {},
            units=dict(start.units or {}),
        )

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Write a line every `log.every` steps, at the first and last step, and for an evaluation or fault."""
        rare = any(name.startswith(("eval/", "fault/")) for name in metrics)
        if rare or step % self._every == 0 or step in (1, self._total):
            self._log.metrics(step, dict(metrics))
        return False

    def on_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Write a line for each sample."""
        self._log.samples(step, samples)

    def on_event(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a line for the event."""
        self._log.event(name, **values)

    def on_end(self, error: BaseException | None) -> None:
        """Close the log."""
        self._log.close()


class CallbackObserver(Observer):
    """Calls a function `(stage, step, metrics)` after every step.

    A true result stops the run. So does an exception, which is kept in `error`.
    """

    def __init__(self, callback: Callable[[str, int, dict[str, float]], Any]) -> None:
        """Store the function."""
        self._callback = callback
        self.error: Exception | None = None
        self.stage: Stage | None = None
        self.metrics: dict[str, float] = {}
        """Metrics of the last step."""

    def on_start(self, start: StageStart) -> None:
        """Store the stage."""
        self.stage = start.stage

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Call the function with a copy of the metrics."""
        assert self.stage is not None
        self.metrics = dict(metrics)
        try:
            return bool(self._callback(self.stage.name, step, dict(metrics)))
        except Exception as error:  # raised to the caller after the state is saved
            self.error = error
            return True
