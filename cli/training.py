"""Parts that training programs share: signal handlers, the progress display, and a report at the end of each stage."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from rlhf.cli.progress import StageProgress

from rlhf.execution.memory import keep_freed_memory
from rlhf.io.printable_text import visible
from rlhf.io.user_log import log_user
from rlhf.monitor.health import findings
from rlhf.monitor.report import write_report
from rlhf.train.observers import Observer, StageStart
from rlhf.train.signals import StopRequest, stop_on_signal
from rlhf.verdicts import Verdict


class Training(NamedTuple):
    """Arguments of `rlhf.train.pipeline.run_stages`."""

    observers: tuple[Observer, ...]
    stop: StopRequest


@contextlib.contextmanager
def open_training() -> Iterator[Training]:
    """Install the signal handlers and set up the process for training until the block ends."""
    keep_freed_memory()
    with stop_on_signal() as stop:
        yield Training((ReportWriter(), StageProgress()), stop)


class ReportWriter(Observer):
    """Observer that writes report/report.html and logs problems when a stage ends, except after a second Ctrl-C."""

    def on_start(self, start: StageStart) -> None:
        """Store the stage's name and the folders."""
        self._stage, folder = start.stage.name, start.config.output_dir
        self._logs, self._report = folder / "logs", folder / "report" / "report.html"

    def on_end(self, error: BaseException | None) -> None:
        """Write the report. A failure to do so does not end the run."""
        if isinstance(error, KeyboardInterrupt):
            return
        path = self._report
        try:
            (reader,) = write_report([self._logs], path)
            problems = [
                finding for finding in findings(reader) if (finding.stage, finding.level) == (self._stage, "problem")
            ]
            lines = [f"report in {path}"]
            lines += [f"PROBLEM {problem.check}: {problem.summary}; {problem.advice}" for problem in problems]
        except Exception as failure:  # of any kind: the trained models must not be lost
            lines = [f"{path}: not written ({failure})"]
        for line in lines:
            log_user(visible(line), stage=self._stage)

    def on_verdict(self, verdict: Verdict) -> None:
        """Write the report again, with the verdict, if it could be written before."""
        with contextlib.suppress(Exception):
            write_report([self._logs], self._report)
