"""Programs on odd machines: streams that cannot be written, locales, users without a home, screens of no size."""

import errno
import importlib.metadata
import io
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from rlhf.cli.command import run_command
from rlhf.cli.process import command_line
from rlhf.cli.progress import StageProgress

from rlhf.config import SFTRun
from rlhf.errors import UserError
from rlhf.io import cache
from rlhf.io.cache import default_cache_dir, home_folder
from rlhf.io.user_log import log_user
from rlhf.stages import STAGES
from rlhf.train.observers import StageStart

PROGRAMS = ["train", "evaluate", "generate", "example", "monitor"]


def run(program: str, *argv: str) -> int:
    """A program in this process; its exit code."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=f"rlhf-{program}")
    try:
        return entry.load()(list(argv))
    except SystemExit as stop:
        return stop.code or 0


class Refusing(io.RawIOBase):
    """A stream that is full, or whose reader or terminal has gone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(self.number, os.strerror(self.number))


def refusing(number: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(Refusing(number)), encoding="utf-8", line_buffering=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_shown_in_any_encoding(monkeypatch, program, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(program, "--help") == 0
    assert b"usage: rlhf-" in stream.buffer.getvalue()


@pytest.mark.parametrize("program", PROGRAMS)
def test_full_output_is_named(monkeypatch, capsys, program):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(program, "--help") == 2
    assert capsys.readouterr().err == "error: standard output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPIPE])
def test_work_goes_on_when_its_messages_cannot_be_written(monkeypatch, number):
    stream = refusing(number)
    monkeypatch.setattr(sys, "stderr", stream)
    done = []

    def train() -> None:
        log_user("a message")
        progress = StageProgress()
        progress.on_start(StageStart(STAGES["sft"], SFTRun(), 0, 2, ()))
        for step in (1, 2):
            progress.on_step(step, {"loss/sft": 1.0})
        progress.on_end(None)
        done.append(True)

    assert run_command(train) == 0
    assert done
    stream.buffer.raw.write = len  # so that it can be closed


def test_lines_of_what_is_piped_in_end_at_any_of_three_and_at_nothing_else(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\rb\r\nc\x0bd\u2028e\n".encode()), newline="\n"))
    read = []
    assert run_command(lambda: read.extend(sys.stdin)) == 0
    assert read == ["a\n", "b\n", "c\x0bd\u2028e\n"]


def test_what_is_piped_in_is_read_as_utf8(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("日本".encode()), encoding="latin-1"))
    read = []
    assert run_command(lambda: read.append(sys.stdin.read())) == 0
    assert read == ["日本"]


def test_closed_streams_are_nowhere(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    read = []
    assert run_command(lambda: read.append(sys.stdin.read())) == 0
    assert read == [""]
    assert run("monitor", "--help") == 0
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize("program", PROGRAMS)
def test_words_that_are_not_utf8_are_refused(capsys, program):
    assert run(program, "--output-dir", "caf\udce9") == 2
    assert "'caf\\udce9' is not UTF-8 text; rename the file" in capsys.readouterr().err


def test_words_are_those_of_the_process_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf-train", "sft"])
    assert command_line(None) == ["sft"]
    assert command_line([]) == []


def test_an_ascii_locale_is_taken_for_utf8(tmp_path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    program = Path(sys.executable).with_name("rlhf-monitor")
    done = subprocess.run(
        [program, "--log-dir", "données", "--check"],
        cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: données")


@pytest.mark.parametrize("columns", ["0", "000", ""])
def test_a_screen_without_columns_shows_something(monkeypatch, columns):
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", columns)
    widths = []
    assert run_command(lambda: widths.append(Console().width)) == 0
    assert widths[0] > 0


@pytest.fixture
def _no_home(monkeypatch, tmp_path):
    """A user id without a name, a home or a cache, as in a container."""

    def refuse(number: int) -> None:
        raise KeyError(number)

    cache._temporary_cache.cache_clear()
    monkeypatch.setattr(pwd, "getpwuid", refuse)
    for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "MPLCONFIGDIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    cache._temporary_cache.cache_clear()


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_the_cache_is_temporary_and_the_user_told_once(monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", logger="rlhf")
    assert home_folder() is None
    folder = default_cache_dir()
    assert folder.is_dir()
    assert default_cache_dir() == folder
    assert caplog.text.count("the cache is in") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "rlhf"


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_libraries_have_a_name_and_folders():
    import getpass

    seen = {}

    def look() -> None:
        seen.update({name: os.environ[name] for name in ("MPLCONFIGDIR", "TRITON_HOME")}, user=getpass.getuser())

    assert run_command(look) == 0
    assert seen["user"] == str(os.getuid())
    assert all(Path(seen[name]).is_dir() for name in ("MPLCONFIGDIR", "TRITON_HOME"))


@pytest.mark.usefixtures("_no_home")
def test_no_folder_at_all_is_refused(monkeypatch):
    def refuse(**options: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    assert run_command(lambda: None) == 0
    with pytest.raises(UserError, match=r"no folder for the cache can be written.*--cache-dir FOLDER"):
        default_cache_dir()


def test_a_home_that_cannot_be_written_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_folder() == tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert home_folder() is None


@pytest.mark.parametrize("value", ["", "cache", "./cache", "../cache"])
def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache_dir() == tmp_path / ".cache" / "rlhf"


def test_torch_is_imported_without_collections_whose_objects_later_ones_skip():
    code = """
import gc, sys
from rlhf.cli.process import fast_imports
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
before = len(collections)
with fast_imports():
    import torch
    assert len(collections) == before
assert gc.isenabled() and gc.get_freeze_count() > 100_000
frozen = gc.get_freeze_count()
with fast_imports():
    assert gc.isenabled()
assert gc.get_freeze_count() == frozen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_collections_go_on_after_an_import_that_fails():
    code = """
import gc
from rlhf.cli.process import fast_imports
try:
    with fast_imports():
        import no_such_module
except ImportError:
    assert gc.isenabled() and not gc.get_freeze_count()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
