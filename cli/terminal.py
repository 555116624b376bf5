"""The terminal on stderr: the library's messages to its user, and a spinner. Stdout stays free for results."""

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
    """Return the console of messages and progress, one for the process: what is printed goes above a spinner or bar."""
    from rich.console import Console  # here, because importing rich takes a while and --help does not need it

    return Console(stderr=True, highlight=False)


def spinner() -> contextlib.AbstractContextManager[object]:
    """Show a sign of life while the block runs; nothing where stderr is no terminal."""
    console = stderr_console()
    return console.status("working") if console.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def user_log_on_stderr() -> Iterator[None]:
    """Show the lines of the logger `rlhf` until the block ends, whatever the root logger does with its own."""
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
    """Prints `stage: text` as it is, without markup and without line breaks of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        stage = getattr(record, "stage", "")
        prefix = ((stage, "bold"), ": ") if stage else ()
        stderr_console().print(Text.assemble(*prefix, record.getMessage()), soft_wrap=True)
