"""Output files at paths that the user chose.

A file is replaced only if rlhf wrote it and it is unchanged since, or if the user says so. Every folder that is written
to has a record, `.rlhf.json`, with the sha256 of each file. Links are followed. Character devices and pipes can be
written to; block devices cannot.
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
    """Raise UserError unless `path` may be written; called before the work is done.

    Args:
        path: a file, which may not exist yet.
        flag: the flag that names the file or its folder.
        inputs: files that the same command reads, in addition to standard input; they are never written.
        overwrite: True replaces a file whoever wrote it; None if the program has no such flag.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder, expected the name of a file")
    if path.is_block_device() or path.is_socket():
        kind = "disk" if path.is_block_device() else "socket"
        raise UserError(f"{flag} {path}: is a {kind}, expected the name of a file")
    if path.is_char_device():  # such as a terminal, which may also be an input
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
        raise UserError(f"{path}: already exists, and is not what rlhf wrote there; choose another {flag}, or {remedy}")
    check_writable(_target(path).parent, flag, _target(path).name)


def write_output(
    path: Path, content: str | bytes, flag: str = "--output-dir", *, overwrite: bool | None = None
) -> None:
    """Write a file atomically and add its checksum to the folder's record; text is written as UTF-8.

    Args:
        path: file to write.
        content: new content.
        flag: flag that names the file or its folder.
        overwrite: True replaces a file whoever wrote it; None if the program has no such flag.

    Raises:
        UserError: `check_output` refuses the path, or the disk is full.
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
    """Write a value as indented JSON with `write_output`.

    Args:
        path: file to write.
        value: any JSON value.
        flag: flag that names the file or its folder.
        overwrite: True replaces a file whoever wrote it; None if the program has no such flag.
    """
    write_output(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", flag, overwrite=overwrite)


def remove_output(path: Path) -> None:
    """Remove a file if rlhf wrote it and it is unchanged since."""
    if is_ours(path):
        _target(path).unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Return whether a file exists and has the content that rlhf wrote last."""
    target = _target(path)
    return target.is_file() and sha256(target) in (_record(target.parent) or {}).get(target.name, [])


def has_record(folder: Path) -> bool:
    """Return whether rlhf has written to a folder and recorded it."""
    return (folder / _RECORD).is_file()


def _record(folder: Path) -> dict[str, list[str]] | None:
    """Return the checksums by file name; None if the record is not one of rlhf's or cannot be read."""
    path = folder / _RECORD
    if not os.path.lexists(path):
        return {}
    try:
        files = read_json(path)["files"]
        return {str(name): [str(digest) for digest in digests] for name, digests in files.items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _add_to_record(target: Path, data: bytes) -> None:
    """Add the checksum of a file's new content to its folder's record.

    If the record belongs to another user, as in /tmp, or is not one of rlhf's, nothing is recorded, and the file is
    replaced later only with --overwrite.
    """
    with _locked(target.parent), contextlib.suppress(UserError):
        if (digests := _record(target.parent)) is not None:
            current = digests.get(target.name, [])[-1:]  # valid until the file is replaced
            digests[target.name] = [*current, hashlib.sha256(data).hexdigest()]
            text = json.dumps({"format": 1, "files": digests}, indent=1) + "\n"
            write_bytes(target.parent / _RECORD, text.encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder's record against other programs in the block, if the disk has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _is_stream(path: Path) -> bool:
    """Return whether the path is a device, a pipe or a file that another process has open under /dev or /proc."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    opened = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return opened or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _open_stream(path: Path, flag: str) -> IO[bytes]:
    """Open a device or pipe to append to it, so that `--output /dev/stdout >> log` keeps the content of the log.

    If no program reads the pipe, wait up to `_PATIENCE_S` for a reader.
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
    """Return the target of a link, which may not exist yet."""
    return Path(os.path.realpath(path))
