"""The terminal on stderr: messages of the library to the user, and a spinner. Stdout is kept for results."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf.io.user_log import LOGGER

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def stderr_console() -> "Console":
    """Return the console of the process for messages and progress. Text is printed above a spinner or bar."""
    from rich.console import Console  # here, because importing rich takes a while and --help does not need it

    return Console(stderr=True, highlight=False)


def spinner() -> contextlib.AbstractContextManager[object]:
    """Show a spinner while the block runs, or nothing if stderr is not a terminal."""
    console = stderr_console()
    return console.status("working") if console.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def user_log_on_stderr() -> Iterator[None]:
    """Show the lines of the logger `rlhf` until the block ends, independently of the root logger."""
    handler, before = _ConsoleHandler(), (LOGGER.level, LOGGER.propagate)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]


class _ConsoleHandler(logging.Handler):
    """Logging handler that prints `stage: text` without markup and without additional line breaks."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        stage = getattr(record, "stage", "")
        prefix = ((stage, "bold"), ": ") if stage else ()
        stderr_console().print(Text.assemble(*prefix, record.getMessage()), soft_wrap=True)
