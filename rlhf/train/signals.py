"""How a stage is asked to stop."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from rlhf.errors import Interrupted
from rlhf.io.progress import console


@dataclass
class StopRequest:
    """Whether a stage was asked to stop, and what it then does."""

    stage: str
    stop_signal: int = field(default=0, init=False)
    """Signal that asked it to stop; 0 when none did."""
    training: bool = field(default=False, init=False)
    """Whether there is something that a signal would lose: it then stops after its step."""


@contextlib.contextmanager
def stop_on_signal(run: StopRequest) -> Iterator[None]:
    """The first signal asks the run to stop after its step, or stops it before the first; Ctrl-C twice does at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        if run.stop_signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_signal = number
        if not run.training:
            raise Interrupted(f"{run.stage}: stopped before its first step", number)
        console.print(f"{run.stage}: finishing the step, then saving (Ctrl-C again stops at once, unsaved)")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that goes away, but for nohup
        numbers.append(signal.SIGHUP)
    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread: whoever runs this there handles signals
        yield
        return
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
