"""Reading tables, a block of rows at a time: CSV, Parquet and Arrow, each row as the record that JSON would hold.

Parquet and Arrow need pyarrow. Their values are converted to JSON values: NaN becomes null, and dates become texts. A
table gives all messages the same keys; keys without a value are removed from each message.
"""

import contextlib
import csv
import io
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.data_files import Record, clear_read_errors, open_stream
from rlhf.errors import UserError

_ROWS_AT_ONCE = 1024
_LONGEST_CELL = 1 << 30
_CELL = rb'(?:"[^"\n]{1,64}"|[\w .#-]{1,64})'
_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?" + _CELL + rb"(?:[,;\t|]" + _CELL + rb")+\r?(?:\n|$)")
_DELIMITERS = ",\t;|"


def is_csv(path: Path, head: bytes) -> bool:
    """Return whether a text file is CSV, by its first bytes or its name."""
    named = path.name.removesuffix(".gz").endswith((".csv", ".tsv"))
    return named or _HEADER.match(head) is not None


def read_csv(path: Path, numbers: Collection[str] = ()) -> Iterator[Record]:
    """Yield the rows of a CSV file whose first row names the columns; values are texts, except those of `numbers`.

    Commas, tabs, semicolons or bars separate the columns, whichever the first row has most of.

    Raises:
        UserError: a row does not fit the first one, quotes do not match, or the file is not UTF-8 or damaged.
    """
    csv.field_size_limit(_LONGEST_CELL)
    with contextlib.closing(open_stream(path)) as stream, clear_read_errors(path):
        names = stream.peek(1 << 13).split(b"\n", 1)[0].decode("utf-8", "replace")
        delimiter = max(_DELIMITERS, key=names.count)
        rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            header = next(rows)
            _check_header(path, header)
            yield from _csv_records(path, header, rows, [name for name in numbers if name in header])
        except csv.Error as error:
            raise UserError(
                f"{path}: line {rows.line_num}: not valid CSV ({error}); texts with {delimiter!r}, quotes or line ends "
                "stand in double quotes, and a quote in them is doubled"
            ) from None
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(
                f"{path}: after line {rows.line_num}: byte 0x{byte:02x} is not UTF-8 ({error.reason}); save the file "
                "as UTF-8"
            ) from None


def _csv_records(path: Path, header: list[str], rows: Any, numbers: list[str]) -> Iterator[Record]:
    number, line = 0, rows.line_num + 1
    for row in rows:
        if row:
            number += 1
            if len(row) != len(header):
                raise UserError(
                    f"{path}: record {number} (line {line}) has {len(row)} values, but the first row names "
                    f"{len(header)} columns; put texts with commas or line ends in double quotes"
                )
            fields = dict(zip(header, row, strict=True))
            if header[0] == "":  # the index that pandas writes
                del fields[""]
            yield Record(number, line, fields | {name: _as_number(fields[name]) for name in numbers})
        line = rows.line_num + 1
    if not number:
        raise UserError(f"{path}: the table has no row below its column names; it needs at least one record")


def _as_number(cell: str) -> float | str:
    """Return the number in a cell; the cell itself if there is none."""
    try:
        return float(cell)
    except ValueError:
        return cell


def _check_header(path: Path, header: list[str]) -> None:
    for name in header[1:] if header[0] == "" else header:
        if not name.strip():
            raise UserError(f"{path}: line 1: a column has no name; the first row names the columns")
        if header.count(name) > 1:
            raise UserError(f"{path}: line 1: two columns are called {name!r}; keep one")


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or holds values other than text, numbers and lists.
    """
    with _arrow_file(path, "Parquet") as (stream, _):
        from pyarrow import parquet

        file = parquet.ParquetFile(stream)
        batches = file.iter_batches(batch_size=_ROWS_AT_ONCE)
        yield from _arrow_records(path, file.schema_arrow, batches)


def read_arrow(path: Path, *, is_stream: bool) -> Iterator[Record]:
    """Yield the rows of an Arrow file (Feather), or of an Arrow stream as `datasets` writes.

    Args:
        path: the file.
        is_stream: True if the file is an Arrow stream.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or holds values other than text, numbers and lists.
    """
    with _arrow_file(path, "Arrow") as (stream, pyarrow):
        if is_stream:
            reader = pyarrow.ipc.open_stream(stream)
            batches: Any = reader
        else:
            reader = pyarrow.ipc.open_file(stream)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        pieces = (
            batch.slice(start, _ROWS_AT_ONCE) for batch in batches for start in range(0, batch.num_rows, _ROWS_AT_ONCE)
        )
        yield from _arrow_records(path, reader.schema, pieces)


@contextlib.contextmanager
def _arrow_file(path: Path, form: str) -> Iterator[tuple[Any, Any]]:
    """Yield a file, which can be read at any place, and the module pyarrow; convert its errors."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{path}: the file is {form}, which pyarrow reads; install it: pip install pyarrow (or 'rlhf[parquet]')"
        ) from None
    with clear_read_errors(path), contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(contextlib.closing(open_stream(path)))
        if not isinstance(stream, io.BufferedReader):  # compressed: unpacked to disk, where any place can be read
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, unpacked, 1 << 20)
            unpacked.seek(0)
            stream = unpacked
        try:
            yield stream, pyarrow
        except (pyarrow.ArrowException, OSError) as error:
            problem = str(error).splitlines()[0][:120]
            raise UserError(f"{path}: the {form} file is damaged or cut off ({problem}); fetch it again") from error


def _arrow_records(path: Path, schema: Any, batches: Any) -> Iterator[Record]:
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two columns are called {name!r}; keep one")
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            number += 1
            yield Record(number, 0, {name: _plain(value, path, name) for name, value in fields.items()})
    if not number:
        raise UserError(f"{path}: the table has no row; it needs at least one record")


def _plain(value: Any, path: Path, column: str) -> Any:
    """Return a value of a table as JSON would hold it."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list | tuple):
        items = [_plain(item, path, column) for item in value]
        return [_without_null(item) if isinstance(item, dict) else item for item in items]
    if isinstance(value, dict):
        return {key: _plain(item, path, column) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}: the column {column!r} holds bytes that are not text; leave it out") from None
    return str(value)


def _without_null(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without the keys that it lacks, which a table fills with null."""
    return {key: value for key, value in message.items() if value is not None or key == "content"}
