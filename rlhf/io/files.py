"""Atomic writes, checksums, free space, and the lock of an output folder."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from rlhf.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors that network disks report when a folder is flushed."""
_LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_MARGIN = 16 << 20  # bytes left free beyond what is about to be written


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path, flag: str = "--output-dir") -> Iterator[Path]:
    """Yield a temporary sibling folder, which replaces `target` if the block ends without an error.

    Files are flushed to disk before the rename. The previous content of `target` exists until then.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with clear_write_errors(target, flag):
            _clear_leftovers(target)
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                _sync(path)
            _sync(temporary)
            if not (target.exists() and _exchange(temporary, target)):
                replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
                if target.exists():
                    target.rename(replaced)
                temporary.rename(target)
                shutil.rmtree(replaced, ignore_errors=True)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path, expected: str) -> None:
    """Raise UserError with the text `expected` unless `folder` is a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file and no' if folder.exists() else 'no such'} folder; {expected}")


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte-order mark.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); convert it with iconv") from error
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {problem}") from error


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        UserError: the file cannot be read, or is not UTF-8 or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error


def write_bytes(path: Path, content: bytes, flag: str = "--output-dir") -> None:
    """Replace a file's content atomically, whoever wrote it; `rlhf.io.output` protects the user's own files.

    Links are followed and permissions are preserved.

    Args:
        path: file to write, created if missing.
        content: new content.
        flag: flag that names another location, for the remedy in errors.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with clear_write_errors(path, flag):
            _clear_leftovers(path)
            temporary.write_bytes(content)
            _sync(temporary)
            with contextlib.suppress(OSError):  # there is no such file yet, or the disk has no permissions
                shutil.copymode(path, temporary)
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                path.write_bytes(content)  # a file that is mounted by itself, as into a container
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def clear_write_errors(path: Path, flag: str = "--output-dir") -> Iterator[None]:
    """Convert the operating system's write errors to a UserError that names the path and the remedy."""
    try:
        with _as_os_errors():
            yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"{path}: no space left to write it; free some, or choose another {flag}") from error
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another {flag}") from error


def check_writable(folder: Path, flag: str, name: str = "trial") -> None:
    """Raise UserError unless files can be written in `folder`, which may not exist yet.

    Writes a small file named `name` with the operations that a checkpoint needs later, and removes it.
    """
    with clear_write_errors(folder, flag), tempfile.TemporaryDirectory(prefix=".rlhf-", dir=_existing(folder)) as path:
        trial = Path(path) / f".{name}.{os.getpid()}.tmp"
        trial.mkdir()
        (trial / "file").write_bytes(b"rlhf")
        _sync(trial / "file")
        _sync(trial)
        trial.rename(Path(path) / name)


def check_free_space(folder: Path, needed: int) -> None:
    """Raise UserError unless `needed` bytes can be written in `folder`, which may not exist yet."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed + _MARGIN:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, but checkpoints and models of this run take {needed / 1e9:.2f} GB; "
            "free some, set checkpoint.keep to 1, or choose another --output-dir"
        )


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors with `safetensors.torch.save_file`, with the permissions of other new files."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: leaf.detach().cpu().contiguous() for name, leaf in tensors.items()}, path, {"format": "pt"})
    with contextlib.suppress(OSError):  # disks without permissions
        path.chmod(mode)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock an output folder in the block; the operating system releases the lock even if the process is killed.

    A folder that is created for the lock and empty at the end is removed.

    Raises:
        UserError: another live process holds the lock, or the folder cannot be written.
    """
    lock_file = folder / ".lock"
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if lock_file.exists() and not (lock_file.is_file() and lock_file.stat().st_size == 0):
            raise UserError(f"{lock_file}: is not a lock of rlhf; move it away, or choose another --output-dir")
        try:
            lock = acquire_lock(lock_file, blocking=False)
        except Timeout as error:
            advice = f"wait for it, or choose another --output-dir (remove {error.lock_file} if there is none)"
            raise UserError(f"{folder}: in use by a live run; {advice}") from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()  # succeeds only on an empty folder


def acquire_lock(path: Path, *, blocking: bool) -> BaseFileLock:
    """Acquire a lock file; if the disk has no locks, the presence of a second file is the lock.

    Raises:
        Timeout: another process holds the lock, and `blocking` is False.
    """
    lock: BaseFileLock = FileLock(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # the library's fallback differs between versions
            lock.acquire(blocking=blocking)
    except (OSError, UserWarning) as error:
        if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in _LOCKLESS):
            raise
        lock = SoftFileLock(path.with_name(f"{path.name}.soft"))
        lock.acquire(blocking=blocking)
    return lock


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes left beside `target`; restore a target that one had moved and not replaced."""
    ours = re.compile(re.escape(f".{target.name}.") + r"(\d{1,9})\.(tmp|old)")
    for path in target.parent.glob(".*"):
        match = ours.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        kind = match[2]
        if kind == "old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Raise an OSError for errors of safetensors and tokenizers that have the system's error number in their text."""
    try:
        yield
    except Exception as error:  # tokenizers raises bare Exception
        match = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1]))) from error


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically and return True; return False if the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, since glibc 2.28
    return rename is not None and rename(-100, os.fsencode(first), -100, os.fsencode(second), 2) == 0


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, if the disk supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
