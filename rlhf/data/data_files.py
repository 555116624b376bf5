"""The files of a data set: several files or folders of shards, plain or compressed, with columns of any name."""

import contextlib
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import UserError
from rlhf.io.files import sha256

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Names of a folder's files that hold records, also with .gz; others, such as README.md, are left out."""
_OWN_FILES = ("dataset_info.json", "dataset_infos.json", "state.json", "manifest.json")
"""Files of `datasets` and of this library that describe the records beside them."""
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


class Record(NamedTuple):
    """A record and its position in the file."""

    number: int
    """Number of the record, from 1."""
    line: int
    """Line on which it begins, from 1; 0 in a file without lines."""
    fields: dict[str, Any]
    path: Path | None = None
    """The file; None if it is not known."""

    @property
    def where(self) -> str:
        """Return the position in words."""
        return f"record {self.number}" + (f" (line {self.line})" if self.line else "")


class DataFiles(NamedTuple):
    """The files of one data set, in the order of their records."""

    paths: tuple[Path, ...]
    """Files, or folders of shards."""
    columns: tuple[str, ...] = ()
    """Other names of columns, each as `name=column`: `prompt=question` reads the column `question` as `prompt` in the
    files that have it. Of several columns for a name, the first that a record has counts."""

    def __str__(self) -> str:
        first = str(self.paths[0])
        return first if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more"

    @property
    def renames(self) -> list[tuple[str, str]]:
        """Return each (name, column), where the column is read under the name."""
        return [(name, column) for name, _, column in (pair.partition("=") for pair in self.columns)]


Source = Path | DataFiles
"""Argument of functions that read data: one file or folder of shards, or several with their columns."""


def data_files(paths: Path | Sequence[Path] | None, columns: Sequence[str] = ()) -> DataFiles | None:
    """Return the files that a setting names; None if it names none."""
    if paths is None:
        return None
    return DataFiles((paths,) if isinstance(paths, Path) else tuple(paths), tuple(columns))


def as_data_files(source: Source) -> DataFiles:
    """Return a source as `DataFiles`."""
    return source if isinstance(source, DataFiles) else DataFiles((source,))


def list_files(source: Source) -> list[Path]:
    """Return every file of a source; those of a folder in the order of their names.

    Raises:
        UserError: there is no such file, or a folder holds no records, or those of several splits.
    """
    files: list[Path] = []
    for path in as_data_files(source).paths:
        files += _shards(path) if path.is_dir() else [path]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: {not_a_file(path)}")
    return files


def content_digest(source: Source) -> str:
    """Return a digest of a source's contents: that of a single file, or of all its files' in their order.

    Raises:
        UserError: `list_files` refuses the source, or a file cannot be read.
    """
    digests = []
    for path in list_files(source):
        with clear_read_errors(path):
            digests.append(sha256(path))
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def not_a_file(path: Path) -> str:
    """Return the problem with a path that is not a file."""
    if path.is_fifo() or path.is_char_device():
        return "is a pipe or device, and data are read more than once; write them to a file"
    return "not a file" if path.exists() else "no such file"


def open_stream(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """Open a file for reading; gzip files are decompressed.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: {not_a_file(path)}")
    with clear_read_errors(path), contextlib.ExitStack() as stack:
        stream = stack.enter_context(path.open("rb"))
        if stream.peek(2)[:2] != b"\x1f\x8b":
            stack.pop_all()
            return stream
    return gzip.open(path)


@contextlib.contextmanager
def clear_read_errors(path: Path) -> Iterator[None]:
    """Convert errors of reading and decompressing a file to a UserError that names it."""
    try:
        yield
    except _DAMAGED as error:
        raise UserError(f"{path}: the compressed file is damaged or cut off ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _shards(folder: Path) -> list[Path]:
    """Return the files of a folder that hold records."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise UserError(f"{folder}: holds the splits of a `datasets` folder ({splits}); name one: {folder}/SPLIT")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    shards = [name for name in names if name.removesuffix(".gz").endswith(_SUFFIXES) and name not in _OWN_FILES]
    if not shards:
        raise UserError(
            f"{folder}: the folder holds no file of records, expected {', '.join(_SUFFIXES)} (also with .gz)"
        )
    found = sorted({match[1] for name in shards if (match := _SPLIT.match(name))})
    if len(found) > 1:
        named = ", ".join(found)
        raise UserError(f"{folder}: holds several splits ({named}); name the files of one: {folder}/{found[0]}*")
    return [folder / name for name in shards]
