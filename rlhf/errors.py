"""The errors that a program turns into a message and an exit code instead of a traceback."""


class UserError(Exception):
    """Something the user gave cannot be used. The message names the file, the record, the key and the remedy.

    Programs print the message alone and exit with 2.
    """

    exit_code = 2


class NonFiniteError(Exception):
    """A loss, gradient, reward or value is not finite; the update was refused before it was applied.

    `batch` holds the offending micro-batch, or what is known of it, so that the caller can write it to disk.
    Programs exit with 3.
    """

    exit_code = 3

    def __init__(self, message: str, batch: object = None) -> None:
        super().__init__(message)
        self.batch = batch


class Interrupted(BaseException):
    """The run was asked to stop by a signal, or by an observer (signal 0), finished its step and saved.

    Programs exit with 128 + the signal.

    As a KeyboardInterrupt it is no Exception: it may come at any moment, and is never a fault of what it comes into.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class WorkersLostError(Exception):
    """More worker processes were lost than may be replaced; the step was finished in one process and saved.

    Programs exit with 4.
    """

    exit_code = 4
