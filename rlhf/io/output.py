"""The one place that decides which of a user's paths may be written, and what is written there.

A file is replaced only if it is as a program of ours left it, or if the user says so. Every folder that is written to
has a record of that, `.rlhf.json`: the sha256 of each file. Devices and pipes are written to, links are followed.
Disks are never written to.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf.errors import UserError
from rlhf.io.files import check_writable, clear_write_errors, read_json, sha256, write_bytes

_RECORD = ".rlhf.json"
_PATIENCE_S = 10.0


def check_output(path: Path, flag: str, *, inputs: Iterable[Path] = (), overwrite: bool | None = None) -> None:
    """Raise UserError, before the work is done, unless `path` may be written.

    Args:
        path: of a file, which may not exist yet.
        flag: by which the user named it, or the folder it is in.
        inputs: files that the same command reads, beside standard input; they are never written.
        overwrite: whether the user lets a file be replaced whoever wrote it; None where there is no such flag.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder, expected the name of a file")
    if path.is_block_device() or path.is_socket():
        kind = "disk" if path.is_block_device() else "socket"
        raise UserError(f"{flag} {path}: is a {kind}, expected the name of a file")
    if path.is_char_device():  # as a terminal, which may be read too
        return
    if _target(path).is_symlink():
        raise UserError(f"{flag} {path}: is a link that leads to itself; remove it, or name another file")
    for file in (*inputs, Path("/dev/stdin")):
        if path.exists() and file.exists() and path.samefile(file):
            raise UserError(f"{flag} {path}: is read by this command too; name another file")
    if _is_stream(path):
        return
    if path.exists() and not overwrite and not is_ours(path):
        remedy = "move it away" if overwrite is None else "add --overwrite"
        raise UserError(
            f"{path}: is there already, and is not what rlhf wrote there; choose another {flag}, or {remedy}"
        )
    check_writable(_target(path).parent, flag, _target(path).name)


def write_output(
    path: Path, content: str | bytes, flag: str = "--output-dir", *, overwrite: bool | None = None
) -> None:
    """Write a file in one step, and its checksum into the folder's record; text as UTF-8.

    Raises:
        UserError: as `check_output`; or the disk is full.
    """
    check_output(path, flag, overwrite=overwrite)
    data = content.encode() if isinstance(content, str) else content
    if _is_stream(path):
        with clear_write_errors(path, flag), _open_stream(path, flag) as stream:
            stream.write(data)
        return
    target = _target(path)
    with clear_write_errors(path, flag):
        target.parent.mkdir(parents=True, exist_ok=True)
    _add_to_record(target, data)
    write_bytes(target, data, flag)


def write_json(path: Path, value: Any, flag: str = "--output-dir", *, overwrite: bool | None = None) -> None:
    """`write_output` of readable JSON."""
    write_output(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", flag, overwrite=overwrite)


def remove_output(path: Path) -> None:
    """Remove a file that a program of ours wrote; anything else stays."""
    if is_ours(path):
        _target(path).unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Whether a file is there and has the content that a program of ours wrote last."""
    target = _target(path)
    return target.is_file() and sha256(target) in (_record(target.parent) or {}).get(target.name, [])


def has_record(folder: Path) -> bool:
    """Whether this version of rlhf has written to a folder."""
    return (folder / _RECORD).is_file()


def _record(folder: Path) -> dict[str, list[str]] | None:
    """Checksums by file name; None where something else is in the record's place, or it cannot be read."""
    path = folder / _RECORD
    if not os.path.lexists(path):
        return {}
    try:
        files = read_json(path)["files"]
        return {str(name): [str(digest) for digest in digests] for name, digests in files.items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _add_to_record(target: Path, data: bytes) -> None:
    """Put the checksum of what a file is to hold into its folder's record.

    Where the record is another user's, as in /tmp, or none of ours, nothing is recorded: the file is then replaced only
    with --overwrite.
    """
    with _locked(target.parent), contextlib.suppress(UserError):
        if (digests := _record(target.parent)) is not None:
            before = digests.get(target.name, [])[-1:]  # of what is there until the file is replaced
            digests[target.name] = [*before, hashlib.sha256(data).hexdigest()]
            text = json.dumps({"format": 1, "files": digests}, indent=1) + "\n"
            write_bytes(target.parent / _RECORD, text.encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other program change the folder's record meanwhile, where the disk has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _is_stream(path: Path) -> bool:
    """Whether it is a device, a pipe or a file that another process has open under /dev or /proc."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    opened = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return opened or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _open_stream(path: Path, flag: str) -> IO[bytes]:
    """Open a device or pipe to write behind what is there: `--output /dev/stdout >> log` keeps what the log has.

    Of a pipe that nobody reads, wait for a reader as long as `_PATIENCE_S`.
    """
    name = str(path.absolute()).replace("/dev/stdout", "/dev/fd/1").replace("/dev/stderr", "/dev/fd/2")
    if opened := re.fullmatch(r"(?:/dev|/proc/self)/fd/(\d+)", name):
        return open(os.dup(int(opened[1])), "wb")
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            stream = open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK), "wb")  # noqa: SIM115 (the caller's)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > end:
                raise UserError(f"{flag} {path}: is a pipe that no program reads; nothing was written") from None
            time.sleep(0.1)
        else:
            os.set_blocking(stream.fileno(), True)
            return stream


def _target(path: Path) -> Path:
    """What a link points to, even if that is not there yet."""
    return Path(os.path.realpath(path))
