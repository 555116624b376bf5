"""Observers of a run: its log, its checkpoints, and whatever a program or a user wants to know while it trains."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.config import RunConfig
from rlhf.io.run_log import FORMAT, RunLog
from rlhf.stages import Stage
from rlhf.train.sink import open_sink

LoopState = dict[str, Any]
"""Plain values, beside the executor's state, that the next step reads; they go into the checkpoint as JSON."""


class StageStart(NamedTuple):
    """A stage that begins to train, or continues."""

    stage: Stage
    config: RunConfig
    step: int
    """Steps done before, in the run that is continued."""
    total: int
    """Steps in all."""
    notes: tuple[str, ...]
    """Lines that the user was told before."""


class Observer:
    """Learns what happens in the training loop; override what is of interest.

    Observers are called in their order, at the end in the reverse order. What one raises ends the run.
    """

    def on_start(self, start: StageStart) -> None:
        """A stage is about to make its first step."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Step number `step`, from 1, was made; return True to stop the run after its state is saved."""
        return False

    def on_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Step number `step` made these completions."""

    def on_event(self, name: str, values: Mapping[str, Any]) -> None:
        """Something else happened: fault, nonfinite, failed, interrupted or end."""

    def on_save(self, step: int, state: LoopState) -> None:
        """The state after `step` steps is to be saved."""

    def on_end(self, error: BaseException | None) -> None:
        """The stage's loop is over, or ended by `error`."""


class Observers:
    """Observers that are called together."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    @contextlib.contextmanager
    def observe(self, start: StageStart) -> Iterator[None]:
        """Call `on_start` now, and at the end of the block `on_end` of all that were started."""
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                observer.on_start(start)
                stack.push(_at_end(observer))
            yield

    def step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Call `on_step`; whether one of them asks to stop."""
        answers = [observer.on_step(step, metrics) for observer in self._observers]
        return any(answers)

    def samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Call `on_samples`."""
        for observer in self._observers:
            observer.on_samples(step, samples)

    def event(self, name: str, **values: Any) -> None:
        """Call `on_event`."""
        for observer in self._observers:
            observer.on_event(name, values)

    def save(self, step: int, state: LoopState) -> None:
        """Call `on_save`."""
        for observer in self._observers:
            observer.on_save(step, state)


def _at_end(observer: Observer) -> Callable[[Any, BaseException | None, Any], bool]:
    def call(kind: Any, error: BaseException | None, trace: Any) -> bool:
        observer.on_end(error)
        return False

    return call


class LogWriter(Observer):
    """Writes logs/: metrics every few steps, samples and events."""

    def on_start(self, start: StageStart) -> None:
        """Open the log. A continued run's later lines are removed."""
        config = start.config
        self._every, self._total = config.log.every, start.total
        self._log = RunLog(
            config.output_dir / "logs",
            start.stage.name,
            after_step=start.step if config.resume else None,
            tensorboard=config.log.tensorboard,
            sink=open_sink(config.log.sink),
        )
        name, notes = "resume" if start.step else "start", list(start.notes)
        self._log.event(name, format=FORMAT, step=start.step, total=start.total, unit=start.stage.unit, notes=notes)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Write a line of metrics."""
        if step % self._every == 0 or step == self._total:
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

    Whatever it returns that is true asks the run to stop. So does an exception, which is kept in `error`.
    """

    def __init__(self, callback: Callable[[str, int, dict[str, float]], Any]) -> None:
        """Args: the function."""
        self._callback = callback
        self.error: Exception | None = None
        self.stage: Stage | None = None
        self.metrics: dict[str, float] = {}
        """Of the last step."""

    def on_start(self, start: StageStart) -> None:
        """Learn which stage it is."""
        self.stage = start.stage

    def on_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Call the function with metrics of its own."""
        assert self.stage is not None
        self.metrics = dict(metrics)
        try:
            return bool(self._callback(self.stage.name, step, dict(metrics)))
        except Exception as error:  # the user's, who gets it after the state is saved
            self.error = error
            return True
