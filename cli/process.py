"""Preparation of the process of a program: command line, streams, home folder and size of the screen."""

import atexit
import contextlib
import gc
import getpass
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

from rlhf.errors import UserError
from rlhf.io.cache import home_folder

_BELOW_HOME = ("MPLCONFIGDIR", "TRITON_HOME")
"""Environment variables that name folders of libraries, which are in the home folder by default."""


def command_line(argv: Sequence[str] | None) -> list[str]:
    """Return the words after the name of the program: `argv`, or those of this process.

    Under an ASCII locale, Python reads file names and words as ASCII, so the program restarts in UTF-8 mode.

    Raises:
        UserError: a word is not UTF-8, so that neither config.yaml nor the logs could hold it.
    """
    if argv is None and sys.getfilesystemencoding() == "ascii" and "utf8" not in sys._xoptions:
        os.environ["PYTHONUTF8"] = "1"  # for the worker processes
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            remedy = "rename the file or folder, or convert the text with iconv"
            raise UserError(f"{word!r} is not UTF-8 text; {remedy}") from None
    return words


@contextlib.contextmanager
def prepared_process() -> Iterator[None]:
    """Run the block with streams that accept every character, folders for caches, and a screen that has a size."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows escapes
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", newline=None)  # what is piped in is read as files are
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "").strip("0") == "":
            os.environ.pop(name, None)
    _settle_user()
    with contextlib.redirect_stderr(cast(TextIO, _LossyStream(sys.stderr))):
        yield


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import torch in the block without garbage collections, which would take a tenth of the time of a start.

    Nearly all objects that an import creates stay, and each full collection traverses all of them. Later collections do
    not traverse them either. If the process has torch already, the block runs as it is.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def flush_output() -> None:
    """Write out the buffer of standard output.

    Raises:
        OSError: it cannot be written. Its content is discarded, so that the interpreter does not try again at exit.
    """
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
        raise


def discard_output() -> None:
    """Discard the buffer of standard output and all later output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _LossyStream:
    """Standard error that drops text which cannot be written, so that the work continues without its messages."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _settle_user() -> None:
    """Set a user name and folders for libraries if there are none, as in a container with a bare user id."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
    missing = [name for name in _BELOW_HOME if not os.environ.get(name)]
    if missing and home_folder() is None:
        try:
            folder = tempfile.mkdtemp(prefix="rlhf-home-")
        except OSError:  # the library that needs a folder reports it
            return
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update(dict.fromkeys(missing, folder))
