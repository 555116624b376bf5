"""The user's log on a program's stderr: every line as it is, once, and an unharmed logger afterwards."""

import io
import logging

import pytest
from rich.console import Console
from rlhf.cli import terminal
from rlhf.cli.command import run_command

from rlhf.errors import UserError
from rlhf.io.user_log import log_user

LOGGER = logging.getLogger("rlhf")
LINES = ["[bold]a[/] \\[b] :smile: 'c' 1.5 /d/e", f"out/{'x' * 300}: a long path " + "with many words " * 20, ""]


@pytest.fixture
def screen(monkeypatch):
    """A terminal with colours, 80 columns wide."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False, legacy_windows=False)
    monkeypatch.setattr(terminal, "stderr_console", lambda: console)
    return console.file


def tell() -> None:
    for line in LINES:
        log_user(line)
    log_user("100 %s of [it]", stage="s[ft]")
    LOGGER.debug("not for the user")


def test_a_program_shows_each_line_as_it_is(capsys):
    assert run_command(tell) == 0
    assert capsys.readouterr() == ("", "\n".join([*LINES, "s[ft]: 100 %s of [it]", ""]))


def test_a_stage_is_bold_on_a_terminal_and_nothing_else_is(screen):
    run_command(tell)
    assert screen.getvalue() == "\n".join([*LINES, "\x1b[1ms[ft]\x1b[0m: 100 %s of [it]", ""])


def test_without_a_program_lines_are_messages_of_the_logger(capsys, caplog):
    log_user("nobody listens")
    caplog.set_level("INFO", logger="rlhf")
    log_user("a line", stage="sft")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage(), record.stage) == ("rlhf", "INFO", "a line", "sft")
    assert capsys.readouterr() == ("", "")


def fail() -> None:
    raise UserError("no")


@pytest.mark.parametrize("command", [tell, fail])
def test_a_program_leaves_the_logger_as_it_was(command):
    before = (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers), list(logging.root.handlers))
    run_command(command)
    assert before == (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers), list(logging.root.handlers))


def test_lines_are_shown_once_where_the_users_code_configures_logging(capsys):
    def command() -> None:
        logging.root.addHandler(handler)
        logging.getLogger("theirs").error("theirs")
        log_user("ours")

    handler = logging.StreamHandler()
    try:
        run_command(command)
    finally:
        logging.root.removeHandler(handler)
    assert capsys.readouterr().err == "theirs\nours\n"


def test_a_spinner_is_shown_on_a_terminal_alone(screen, capsys, monkeypatch):
    with terminal.spinner():
        log_user("below a program")
    assert "working" in screen.getvalue()
    monkeypatch.undo()
    with terminal.spinner():
        pass
    assert capsys.readouterr() == ("", "")
