"""Requests to stop a run, and the signals by which a program's user makes them."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from rlhf.errors import Interrupted
from rlhf.io.user_log import log_user


@dataclass
class StopRequest:
    """Asks a run to stop after its step, and to save its state."""

    requested: bool = False
    signal: int = 0
    """Number of the signal that asked; 0 where none did."""
    stage: str = ""
    """Stage that runs; empty between stages."""
    training: bool = False
    """Whether the stage has a state to save: it then stops after its step, otherwise at once."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Let the first signal ask the run to stop, and a second Ctrl-C stop it at once.

    For programs: handlers of SIGINT, SIGTERM and SIGHUP are installed, and put back at the end of the block.
    """
    stop = StopRequest()

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested, stop.signal = True, number
        if not stop.training:
            raise Interrupted(f"{stop.stage or 'training'}: stopped before its first step", number)
        log_user("finishing the step, then saving (Ctrl-C again stops at once, unsaved)", stage=stop.stage)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that goes away, but for nohup
        numbers.append(signal.SIGHUP)
    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread: whoever runs this there handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
