"""The terminal dashboard: in any size, of any run, with any text in it; and the program on a real pseudo-terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rlhf.cli.monitor_live import dashboard, follow, sparkline
from synthetic_logs import append, completion, write_log

from rlhf.io.printable_text import shorten, visible
from rlhf.monitor.log import LogReader, Series

NASTY = "a\x1b[31mred\x07\r\n\u202eevil\u2066\ud800 $x_1$ [bold]<script> 你好 é \U0001f600"


def shown(folder, width: int = 80, height: int = 24, now: float = 1e9 + 70, **options) -> list[str]:
    reader = LogReader(folder)
    reader.poll()
    return [line.plain for line in dashboard(reader, width, height, now, **options)]


def nasty(step: int, row: int) -> dict:
    return {"prompt": NASTY, "completion": NASTY * 9, "score": None, "kl": "x", "step": step}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs in every state."""
    base = tmp_path_factory.mktemp("runs")
    write_log(base / "finished")
    write_log(base / "growing", count=30, end=False)
    write_log(base / "one", count=1, end=False, samples=0)
    write_log(base / "hostile", sample=nasty, figures={"$bad\x1b": lambda step: None, "gold/[red]": float})
    write_log(base / "sick", figures={"objective/kl": lambda step: -2.0, "policy/clipfrac_avg": lambda step: 0.6})
    write_log(base / "pipeline", stage="sft", count=9, figures={"loss/sft": lambda step: 3.0 / step}, samples=0)
    write_log(base / "pipeline", stage="reward", count=9, figures={"loss/reward": lambda step: 0.6}, samples=0)
    write_log(base / "foreign", stage="x\x1by", count=9, figures={"a": float}, samples=0)
    (base / "empty" / "logs").mkdir(parents=True)
    with (write_log(base / "crashed", count=9, end=False) / "metrics.jsonl").open("a") as stream:
        stream.write('garbage\n{"stage": "ppo", "st')
    return base


RUNS = ("finished", "growing", "one", "hostile", "sick", "pipeline", "foreign", "empty", "crashed")


@pytest.mark.parametrize("size", [(40, 12), (20, 5), (80, 24), (200, 60), (10, 2)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_it_fits_any_size_and_draws_nothing_that_a_terminal_acts_on(runs, name, size, ascii_only):
    width, height = size
    lines = shown(runs / name, width, height, ascii_only=ascii_only)
    assert 1 <= len(lines) <= max(height - 1, 1)
    for line in lines:
        assert cell_len(line) <= width
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", line)
        assert line.isascii() or not ascii_only


def test_a_small_terminal_has_what_matters(runs):
    text = "\n".join(shown(runs / "sick", 40, 12))
    assert "ppo 60/60" in text
    assert "score" in text
    assert "2 problems" in text
    assert "PROBLEM ppo negative-kl" in text
    assert "KL, nats" in text


def test_a_small_terminal_has_a_problem_before_what_the_log_lacks(tmp_path):
    for _ in range(2):
        write_log(tmp_path, figures={"objective/kl": lambda step: -2.0})
    lines = shown(tmp_path, 40, 12)
    assert any(line.startswith("PROBLEM ppo negative-kl") for line in lines)
    assert any(line.startswith("log     metrics.jsonl: holds more") for line in lines)


def test_a_large_terminal_has_everything(runs):
    lines = shown(runs / "finished", 120, 50)
    text = "\n".join(lines)
    for piece in (
        "gold judge",
        "entropy/token",
        "tokens/s",
        "health",
        "newest completions",
        "my item 7 broke",
        "1.2 s/it",
    ):
        assert piece in text
    values = [line.split()[1] for line in lines if line.startswith("score ")]
    assert re.fullmatch(r"-?\d+\.\d+", values[0])


def test_what_rounds_to_0_has_no_sign(tmp_path):
    logs = write_log(tmp_path, count=1, sample=lambda step, row: completion(step, row) | {"score": -1e-5, "kl": -1e-5})
    assert "-0.00" not in "\n".join(shown(logs, 120, 50))
    assert "score   0.00, KL 0.00" in "\n".join(shown(logs, 120, 50))


def test_an_empty_completion_has_a_mark(tmp_path):
    logs = write_log(tmp_path, count=1, samples=1, sample=lambda *place: completion(*place) | {"completion": " \n"})
    assert "(empty)" in "\n".join(shown(logs, 120, 50))
    assert "(empty)" not in (logs / "samples.jsonl").read_text()


def test_what_is_newest_is_shown_as_the_log_grows(tmp_path):
    logs = write_log(tmp_path, count=5, end=False, samples=1)
    reader = LogReader(logs)
    reader.poll()
    assert "ppo 5/5" in dashboard(reader, 80, 24, 1e9)[0].plain
    append(logs / "metrics.jsonl", "ppo", [{"step": 6, "time": 1e9, "objective/scores": 1234.5}])
    append(logs / "samples.jsonl", "ppo", [{"step": 6} | completion(6, 0) | {"completion": " brand new"}])
    with (logs / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "ppo", "step": 7, "objective/sco')  # being written
    reader.poll()
    text = "\n".join(line.plain for line in dashboard(reader, 80, 24, 1e9))
    assert "ppo 6/5" in text
    assert re.search(r"score +1234", text)
    assert "brand new" in text


@pytest.mark.parametrize(
    ("name", "later", "piece"),
    [
        ("growing", 10, "1.2 s/iteration"),
        ("growing", 10, "running"),
        ("growing", 110, "running"),  # as while it compiles
        ("growing", 300, "silent for 5:00, killed?"),
        ("finished", 9999, "ended"),
        ("crashed", 4000, "silent for 1:06:40, killed?"),
    ],
)
def test_it_says_whether_the_run_still_runs(runs, name, later, piece):
    counts = {"growing": 30, "finished": 60, "crashed": 9}
    assert piece in shown(runs / name, now=1e9 + 1.2 * counts[name] + later)[1]


def test_it_says_when_the_stage_will_end(tmp_path):
    logs = write_log(tmp_path, count=30, end=False)
    text = (logs / "metrics.jsonl").read_text().replace('"total": 30', '"total": 130')
    (logs / "metrics.jsonl").write_text(text)
    assert "2:00 left" in shown(tmp_path, now=1e9 + 37)[1]


def test_problems_of_the_log_and_waiting_for_one_are_said(runs):
    assert "1 line is cut off" in "\n".join(shown(runs / "crashed"))
    assert "waiting for" in "\n".join(shown(runs / "empty", 300))


def test_sparkline_shows_the_course():
    rising = Series(np.arange(8), np.arange(8.0))
    assert sparkline(rising, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(rising, 4) == "▁▃▆█"
    assert sparkline(rising, 99) == "▁▂▃▄▅▆▇█"
    assert sparkline(Series(np.arange(3), np.full(3, 5.0)), 3) == "▄▄▄"
    assert sparkline(Series(np.arange(3), np.array([0, np.nan, 1.0])), 3) == "▁ █"
    assert sparkline(Series(np.arange(2), np.full(2, np.nan)), 3) == ""
    assert sparkline(Series(np.empty(0, int), np.empty(0)), 3) == ""
    assert sparkline(rising, 8, "lmh") == "llmmmmhh"


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(allow_infinity=False), max_size=40), width=st.integers(1, 20))
def test_sparkline_fits_any_series(values, width):
    finite = [value if abs(value) < 1e300 else 0.0 for value in values]
    assert len(sparkline(Series(np.arange(len(values)), np.array(finite)), width)) <= width


def test_visible_spells_out_what_acts_and_keeps_what_is_text():
    assert visible("a\nb\tc") == "a↵b c"
    assert visible("\x1b[0m\u202e\ud800\U000e0001") == r"\x1b[0m\u202e\ud800\U000e0001"
    assert visible("é你好😀 $[bold]<b>") == "é你好😀 $[bold]<b>"
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("abcd", 4) == "abcd"


def test_without_a_terminal_it_prints_once_and_ends(runs):
    stream = io.StringIO()
    follow(runs / "sick", Console(file=stream, width=70, height=20))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert text.count("ppo 60/60") == 1


def started(folder, **environment: str) -> tuple[subprocess.Popen, int]:
    """rlhf-monitor --live on a pseudo-terminal of 60 x 20."""
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    code = (
        "import signal, sys; from rlhf.cli.monitor import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job hands on that it is ignored
        f"sys.exit(main(['--log-dir', {str(folder)!r}, '--live']))"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env=inherited | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(follower)
    return process, leader


def read_until(leader: int, piece: str, seconds: float = 60.0) -> str:
    """What was written up to and including `piece`, or to the end."""
    text, end = "", time.monotonic() + seconds
    while piece not in text and time.monotonic() < end:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other side has gone
                break
            text += chunk.decode("utf-8", "replace")
    return text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_on_a_terminal_it_follows_until_it_is_stopped_and_leaves_the_screen_whole(tmp_path, number, code):
    logs = write_log(tmp_path, count=5, end=False, samples=1)
    process, leader = started(logs)
    text = read_until(leader, "ppo 5/5")
    append(logs / "metrics.jsonl", "ppo", [{"step": 6, "time": 1e9, "objective/scores": 1.0}])
    text += read_until(leader, "ppo 6/5")
    process.send_signal(number)
    text += read_until(leader, "\0never")
    assert process.wait(timeout=30) == code
    os.close(leader)
    assert "ppo 5/5" in text
    assert "ppo 6/5" in text
    assert text.index("\x1b[?1049h") < text.index("\x1b[?1049l"), "back from the alternate screen"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is there again"
    assert "Traceback" not in text


def test_without_colour_nothing_is_coloured(tmp_path):
    logs = write_log(tmp_path, count=5, figures={"objective/kl": lambda step: -2.0})
    process, leader = started(logs, NO_COLOR="1")
    text = read_until(leader, "ended")
    process.send_signal(signal.SIGINT)
    text += read_until(leader, "\0never")
    assert process.wait(timeout=30) == 0
    os.close(leader)
    assert not re.search(r"\x1b\[[\d;]*3[0-7]m", text)


def test_a_terminal_that_cannot_move_its_cursor_gets_one_picture(tmp_path):
    process, leader = started(write_log(tmp_path, count=5), TERM="dumb")
    text = read_until(leader, "\0never")
    assert process.wait(timeout=30) == 0
    os.close(leader)
    assert "\x1b[?1049h" not in text
    assert text.count("ppo 5/5") == 1
