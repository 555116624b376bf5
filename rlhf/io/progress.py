"""Messages to the user on stderr."""

import contextlib

from rich.console import Console

console = Console(stderr=True, highlight=False)
"""Messages and progress go to stderr; stdout stays free for results."""


def tell(text: str) -> None:
    """Say one line to the user."""
    console.print(text, markup=False, soft_wrap=True)


def working(text: str) -> contextlib.AbstractContextManager[object]:
    """Say one line to the user, with a sign of life behind it while the block runs, where there is a terminal."""
    tell(text)
    return console.status("working") if console.is_terminal else contextlib.nullcontext()
