"""Requests to stop a run, and the signal handlers that set them."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from rlhf.errors import Interrupted
from rlhf.io.user_log import log_user


@dataclass
class StopRequest:
    """Request to a run to finish its step, save its state and stop."""

    requested: bool = False
    signal: int = 0
    """Number of the signal that set the request; 0 if there was none."""
    stage: str = ""
    """Name of the running stage; empty between stages."""
    training: bool = False
    """True if the stage has a state to save. It then stops after its step, and otherwise immediately."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Install handlers of SIGINT, SIGTERM and SIGHUP that set a stop request, until the block ends.

    A second Ctrl-C stops the run immediately. Only programs use this function.
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
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # the terminal was closed; nohup ignores it
        numbers.append(signal.SIGHUP)
    try:
        previous = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not the main thread, which alone handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
