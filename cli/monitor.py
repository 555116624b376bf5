"""rlhf-monitor: follow, check and plot runs, while they run and afterwards.

Usage:
    rlhf-monitor --log-dir outputs/logs --live
    rlhf-monitor --log-dir outputs/logs --serve
    rlhf-monitor --log-dir outputs/logs --plot-type all --plot-format pdf
    rlhf-monitor --log-dir seed-0 seed-1 other-0 other-1 --compare
    rlhf-monitor --log-dir outputs/logs --check
    rlhf-monitor --log-dir seed-0/logs seed-1/logs seed-2/logs --report
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval
from rlhf.cli.arguments import parse_arguments
from rlhf.cli.command import run_command
from rlhf.cli.help import Help
from rlhf.cli.process import command_line

from rlhf.errors import UserError
from rlhf.io.user_log import log_user
from rlhf.ranges import Section
from rlhf.setting_rules import Rule, check_rules


@dataclass(frozen=True, kw_only=True)
class Monitor(Section):
    """Settings of rlhf-monitor."""

    log_dir: tuple[Path, ...] = (Path("outputs/logs"),)
    """Log folders or output folders of runs. Several runs are compared: those with the same settings are one line with
    a 95% interval over their seeds."""
    live: bool = False
    """Follow one run in the terminal until Ctrl-C. Without a terminal, its state is printed once."""
    serve: bool = False
    """Follow runs on a local web page with charts, samples and health checks."""
    report: bool = False
    """Write the same page as one self-contained file, report.html."""
    compare: bool = False
    """Print the settings in which runs differ, and a table of their final figures."""
    plot_type: Literal["all", "loss", "reward", "kl", "lengths", "timing", "samples"] | None = None
    """Write the plots of one kind, or all of them."""
    plot_format: Literal["png", "pdf", "svg"] = "png"
    """File format of plots."""
    titles: bool = True
    """Write the question that each plot answers above it."""
    check: bool = False
    """Print the health checks. The exit code is 1 if one of them finds a problem, and 0 otherwise."""
    output_dir: Path | None = None
    """Folder for plots and report.html. If None, report/ beside the first run's logs/."""
    overwrite: bool = False
    """Replace existing files even if rlhf did not write them, or if they were changed since."""
    port: Annotated[int, Interval(ge=0, le=65535)] = 8742
    """Port of the page (localhost only); 0 selects a free one."""
    open_browser: bool = True
    """Open the page in a browser, with --serve."""


RULES = (
    Rule(("port", "open_browser"), lambda settings: not settings.serve, "has no effect without --serve", refused=True),
    Rule(
        ("output_dir", "overwrite"),
        lambda settings: not settings.report and settings.plot_type is None,
        "has no effect without --report or --plot-type",
        refused=True,
    ),
    Rule(
        ("plot_format", "titles"),
        lambda settings: settings.plot_type is None,
        "has no effect without --plot-type",
        refused=True,
    ),
)


_ABOUT = Help(
    prog="rlhf-monitor",
    description="Show how runs are doing, from their logs: live in the terminal, on a web page, as plots or as health "
    "checks. Choose one of --live, --serve, --report, --plot-type, --compare and --check; --live is the "
    "default.",
    usage=__doc__ or "",
    page="docs/monitoring.md",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    codes: list[int] = []
    failed = run_command(lambda: codes.append(_monitor(parse(command_line(argv)))))
    return failed or sum(codes)


def parse(argv: Sequence[str]) -> Monitor:
    """Return the settings of a command line. Prints the help and exits, or prints errors and exits with code 2."""
    return parse_arguments(Monitor, argv, about=_ABOUT)


def _monitor(settings: Monitor) -> int:
    actions: dict[str, tuple[bool, Callable[[Monitor], int]]] = {
        "--live": (settings.live, _live),
        "--serve": (settings.serve, _serve),
        "--report": (settings.report, _report),
        "--compare": (settings.compare, _compare),
        "--plot-type": (settings.plot_type is not None, _plot),
        "--check": (settings.check, _check),
    }
    chosen = [name for name, (requested, _) in actions.items() if requested] or [
        "--compare" if len(settings.log_dir) > 1 else "--live"
    ]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: one at a time")
    check_rules(settings, RULES)
    if not settings.log_dir:
        raise UserError("--log-dir: expected at least one folder")
    return actions[chosen[0]][1](settings)


def _live(settings: Monitor) -> int:
    if len(settings.log_dir) > 1:
        raise UserError("--live follows one run; give one --log-dir, or compare several with --compare or --serve")
    from rich.console import Console  # imported here because it may take a second
    from rlhf.cli.monitor_live import follow

    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it
        follow(settings.log_dir[0], Console(highlight=False))
    return 0


def _serve(settings: Monitor) -> int:
    from rlhf.monitor.serve import make_server, open_page

    with make_server(settings.log_dir, settings.port) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        log_user(f"following {', '.join(map(str, settings.log_dir))} at {address} (Ctrl-C ends)")
        if settings.open_browser:
            open_page(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log_user("stopped")
    return 0


def _report(settings: Monitor) -> int:
    from rlhf.monitor.report import write_report

    path = _output(settings) / "report.html"
    write_report(settings.log_dir, path, overwrite=settings.overwrite)
    print(path)
    return 0


def _plot(settings: Monitor) -> int:
    from rlhf.monitor.plots import write_plots

    folder, kind = _output(settings), settings.plot_type or "all"
    paths = write_plots(
        settings.log_dir,
        kind,
        folder,
        overwrite=settings.overwrite,
        file_format=settings.plot_format,
        titles=settings.titles,
    )
    for path in paths:
        print(path)
    return 0


def _compare(settings: Monitor) -> int:
    from rich.console import Console
    from rlhf.cli.monitor_compare import print_comparison

    print_comparison(settings.log_dir, Console(highlight=False))
    return 0


def _check(settings: Monitor) -> int:
    from rich.console import Console
    from rlhf.cli.monitor_health import print_findings

    return int(print_findings(settings.log_dir, Console(highlight=False)))


def _output(settings: Monitor) -> Path:
    from rlhf.monitor.log import log_folder

    return settings.output_dir or log_folder(settings.log_dir[0]).absolute().parent / "report"
