"""Reading data files of every form, one record at a time, with the position of errors.

The first bytes tell JSON lists, JSON Lines, CSV, Parquet and Arrow apart, each also compressed by gzip. JSON is read
here: only the record being read is in memory.
"""

import codecs
import contextlib
import io
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.data_files import Record, clear_read_errors, open_stream
from rlhf.data.tables import is_csv, read_arrow, read_csv, read_parquet
from rlhf.errors import UserError

_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_FOREIGN = {
    b"version https://git-lfs": "the file is a Git LFS pointer; fetch what it points to: git lfs pull",
    b"\x28\xb5\x2f\xfd": "the file is compressed by zstd; unpack it with unzstd",
    b"BZh": "the file is compressed by bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "the file is compressed by xz; unpack it with unxz",
    b"PK\x03\x04": "the file is a zip archive (.zip, .xlsx, …); unpack it or save it as JSON",
}
"""Remedy by a file's first bytes, for forms that are not read."""


def read_records(path: Path, *, numbers: Collection[str] = ()) -> Iterator[Record]:
    """Yield the records of a file in its order; its content tells the form: JSON, JSON Lines, CSV, Parquet or Arrow.

    Args:
        path: the file.
        numbers: columns that hold numbers; in CSV, all others are texts.

    Raises:
        UserError: the file is missing, empty, not UTF-8, not JSON (with line and column), not a list of objects, or
            has duplicate keys or NaN literals, or a table cannot be read (`rlhf.data.tables`); the message names the
            file, the record and the remedy.
    """
    with contextlib.closing(_Source(path)) as source:
        if source.head.startswith(b"PAR1"):
            yield from read_parquet(path)
        elif source.head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
            yield from read_arrow(path, is_stream=source.head.startswith(b"\xff"))
        elif (character := source.first_character()) in "[{":
            yield from _records(path, source, is_list=character == "[")
        else:
            yield from read_csv(path, numbers)


def _records(path: Path, source: "_Source", *, is_list: bool) -> Iterator[Record]:
    if is_list:
        source.position += 1
    number = 0
    while (character := source.skip_space()) not in ("", "]" if is_list else ""):
        if is_list and number:
            if character != ",":
                raise source.error(f"expected ',' or ']' after record {number}, got {character!r}")
            source.position += 1
            if source.skip_space() == "]":
                raise source.error("a comma stands before the closing ']'; remove it")
        elif number and character == ",":
            raise source.error(f"a comma follows record {number}; remove such commas, or put '[' and ']' around all")
        number += 1
        line = source.line_of(source.position)
        value = source.decode(number)
        if not isinstance(value, dict):
            raise UserError(
                f"{path}: record {number} (line {line}) is {_kind(value)}, expected an object {{...}} with named texts"
            )
        yield Record(number, line, value)
    if is_list:
        if character == "":
            raise source.error(f"the file ends after record {number} without the closing ']'; it is cut off")
        source.position += 1
        if source.skip_space():
            raise source.error("text follows the closing ']' of the list; remove it")
    if number == 0:
        raise UserError(f"{path}: the list is empty; it needs at least one record")


class _DuplicateKeyError(ValueError):
    pass


class _LiteralError(ValueError):
    pass


class _Source:
    """A window over a decoded file, which grows while a record is incomplete and drops the text before the position."""

    def __init__(self, path: Path) -> None:
        self.path, self.stream = path, open_stream(path)
        with clear_read_errors(path):
            self.head = self.stream.peek(1 << 13)  # the beginning, as much as is there
        self.decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("strict"), translate=True)
        self.json = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_literal)
        self.window, self.position = "", 0
        self.column_before = 0  # of the text dropped from the window
        self.lines, self.counted = 0, 0  # line ends before window[counted]: every one is counted once
        self.at_end = False

    def first_character(self) -> str:
        """Return the first character that is not white space: '[' or '{' in JSON, or else the first of a CSV file."""
        head = self.head
        for magic, remedy in _FOREIGN.items():
            if head.startswith(magic):
                raise UserError(f"{self.path}: {remedy}")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
            raise UserError(f"{self.path}: the text is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
        if head.startswith(codecs.BOM_UTF8):
            self.stream.read(len(codecs.BOM_UTF8))
        character = self.skip_space()
        if character == "":
            raise UserError(
                f"{self.path}: the file is empty; it needs a JSON list of objects, one object per line, or a table"
            )
        if character not in "[{" and not is_csv(self.path, head):
            raise self.error(
                f"the file begins with {character!r}, expected a JSON list '[', an object '{{' per line, or the column "
                "names of a CSV table"
            )
        return character

    def close(self) -> None:
        self.stream.close()

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it; '' at the end of the file."""
        while True:
            while self.position < len(self.window):
                if self.window[self.position] not in _SPACE:
                    return self.window[self.position]
                self.position += 1
            if not self._read():
                return ""

    def decode(self, number: int) -> Any:
        """Return the JSON value at the position and move past it."""
        while True:
            try:
                value, end = self.json.raw_decode(self.window, self.position)
            except json.JSONDecodeError as error:
                open_text, start = error.msg.startswith("Unterminated string"), self.position
                if (open_text or error.pos >= len(self.window) - 12) and self._read():
                    continue
                self.position = error.pos - (start - self.position)  # reading drops the text before
                cut_off = self.at_end and (open_text or not self.window[self.position :].strip())
                cut = "; the file is cut off" if cut_off else ""
                raise self.error(f"record {number} is not valid JSON ({error.msg}){cut}") from None
            except RecursionError:
                raise self.error(f"record {number} is nested too deeply; texts and numbers are expected") from None
            except _DuplicateKeyError as error:
                raise self.error(f"record {number} has the key {error} twice; keep one") from None
            except _LiteralError as error:
                raise self.error(
                    f"record {number} contains {error}, which JSON does not have; use null or a number"
                ) from None
            except ValueError as error:  # Python reads numbers of up to 4300 digits
                raise self.error(f"record {number} has a number that cannot be read ({error})") from None
            self.position = end
            return value

    def error(self, problem: str) -> UserError:
        line_start = self.window.rfind("\n", 0, self.position) + 1
        column = self.position - line_start + 1 + (0 if line_start else self.column_before)
        return UserError(f"{self.path}: line {self.line_of(self.position)}, column {column}: {problem}")

    def line_of(self, position: int) -> int:
        """Return the line of a position, from 1; positions must not decrease between calls."""
        self.lines += self.window.count("\n", self.counted, position)
        self.counted = position
        return self.lines + 1

    def _read(self) -> bool:
        """Drop the text before the position and append at least as much as is left; return False if none follows."""
        if self.at_end:
            return False
        dropped = self.window[: self.position]
        newline = dropped.rfind("\n")
        self.column_before = len(dropped) - newline - 1 + (self.column_before if newline < 0 else 0)
        self.line_of(self.position)
        self.window, self.position, self.counted = self.window[self.position :], 0, 0
        with clear_read_errors(self.path):
            block = self.stream.read(max(_CHUNK, 2 * len(self.window)))
        self.at_end = not block
        try:
            text = self.decoder.decode(block, final=self.at_end)
        except UnicodeDecodeError as error:
            line = self.line_of(len(self.window)) + len(re.findall(rb"\r\n|\r|\n", error.object[: error.start]))
            byte = error.object[error.start] if error.start < len(error.object) else 0
            raise UserError(
                f"{self.path}: line {line}: byte 0x{byte:02x} is not UTF-8 ({error.reason}); save the file as UTF-8"
            ) from None
        if "\0" in text:
            raise UserError(
                f"{self.path}: contains NUL characters; it is not UTF-8 text (UTF-16?); convert it to UTF-8"
            )
        self.window += text
        return bool(text) or not self.at_end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(repr(next(name for name in names if names.count(name) > 1)))
    return fields


def _refuse_literal(literal: str) -> None:
    raise _LiteralError(literal)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "an object")
