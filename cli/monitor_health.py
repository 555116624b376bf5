"""Health checks in the terminal."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlhf.io.printable_text import visible
from rlhf.monitor.health import Finding, findings
from rlhf.monitor.log import read_logs
from rlhf.monitor.thresholds import Level
from rlhf.monitor.view import run_names

STYLES: dict[Level, str] = {"problem": "bold red", "warning": "yellow", "ok": "green", "unknown": "dim"}


def verdict(results: Sequence[Finding]) -> Text:
    """Return the number of findings of each level, such as `1 problem, 2 warnings, 20 ok`."""
    counts = Counter(finding.level for finding in results)
    parts = [
        Text(f"{counts[level]} {level}{'s' * (level in ('problem', 'warning') and counts[level] > 1)}", style)
        for level, style in STYLES.items()
        if counts[level]
    ]
    return Text(", ").join(parts) if parts else Text("nothing to check yet", "dim")


def finding_line(finding: Finding) -> Text:
    """Return a finding in one line."""
    word = finding.level.upper() if finding.level == "problem" else finding.level
    line = Text.assemble((f"{word:<8}", STYLES[finding.level]), f"{finding.stage} {finding.check}: ")
    return line.append(visible(finding.summary))


def finding_details(finding: Finding) -> list[Text]:
    """Return evidence, cause and advice of a problem or warning."""
    if finding.level not in ("problem", "warning"):
        return []
    parts = {"evidence": finding.evidence, "likely cause": finding.cause, "what to change": finding.advice}
    return [Text.assemble((f"        {name}: ", "dim"), visible(text)) for name, text in parts.items() if text]


def print_findings(log_dirs: Sequence[Path], console: Console) -> bool:
    """Print every check of every run, and return True if one of them has found a problem.

    Raises:
        UserError: a folder is no run's, or its log has nothing to check.
    """
    readers = read_logs(log_dirs)
    every = []
    for reader, name in zip(readers, run_names(readers), strict=True):
        results = findings(reader)
        console.print(Text.assemble((visible(name), "bold"), ": ", verdict(results)), soft_wrap=True)
        for line in [
            *(Text(visible(problem)) for problem in reader.problems),
            *(line for finding in results for line in _lines(finding)),
        ]:
            console.print(line, soft_wrap=True)
        every += results
    return any(finding.level == "problem" for finding in every)


def _lines(finding: Finding) -> list[Text]:
    return [finding_line(finding), *finding_details(finding)]
