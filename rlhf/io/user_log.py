"""One-line messages to the user, through the standard library's logger `rlhf`.

The programs show these lines on stderr. In other code they are ordinary messages of a logger:

    >>> import logging
    >>> logging.basicConfig(level="INFO")
"""

import logging

LOGGER = logging.getLogger("rlhf")


def log_user(text: str, *, stage: str = "") -> None:
    """Log one line for the user.

    Args:
        text: the line, without markup.
        stage: training stage, which the programs show before the line; empty for none.
    """
    LOGGER.info("%s", text, extra={"stage": stage})
