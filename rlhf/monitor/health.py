"""Named checks over a run's log."""

from typing import Literal, NamedTuple

from rlhf.monitor.log import LogReader


class Finding(NamedTuple):
    """What one check says of one stage."""

    check: str
    """Its name, such as `kl`."""
    level: Literal["ok", "warning", "problem", "unknown"]
    stage: str
    summary: str
    """One line."""
    evidence: str
    """The figures it goes by."""
    cause: str
    """What it usually comes from."""
    advice: str
    """What to change, by our flags."""
    steps: tuple[int, int] | None
    """First and last step that the evidence is about."""


def findings(reader: LogReader) -> list[Finding]:
    """What the checks say of every stage so far; problems first."""
    return []
