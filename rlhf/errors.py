"""Errors that a program reports as a message and an exit code instead of a traceback."""


class UserError(Exception):
    """Invalid input of the user. The message names the file, the record, the key and the remedy.

    Programs print only the message and exit with code 2.
    """

    exit_code = 2


class NonFiniteError(Exception):
    """A loss, gradient, reward or value is not finite, and the update was refused before it was applied.

    `batch` is the offending micro-batch, or None if it is unknown, so that the caller can write it to disk. Programs
    exit with code 3.
    """

    exit_code = 3

    def __init__(self, message: str, batch: object = None) -> None:
        super().__init__(message)
        self.batch = batch


class Interrupted(BaseException):
    """The run was stopped by a signal, or by an observer (signal 0), after it finished its step and saved its state.

    Programs exit with code 128 + the signal. Like KeyboardInterrupt, this is not an Exception: it can be raised
    anywhere, and is not an error of the interrupted code.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class WorkersLostError(Exception):
    """More workers were lost than may be replaced; the step was finished in one process and its state was saved.

    Programs exit with code 4.
    """

    exit_code = 4
