"""Messages to the user, a line at a time, through the standard library's logger `rlhf`.

The programs show these lines on stderr. Elsewhere they are a logger's messages like any others:

    >>> import logging
    >>> logging.basicConfig(level="INFO")
"""

import logging

LOGGER = logging.getLogger("rlhf")


def log_user(text: str, *, stage: str = "") -> None:
    """Tell the user one line.

    Args:
        text: the line, without markup.
        stage: of training, which the programs show in front of it; empty for none.
    """
    LOGGER.info("%s", text, extra={"stage": stage})
