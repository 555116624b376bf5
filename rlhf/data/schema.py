"""The three kinds of data file and the checks of their records."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf.data.records import Record, read_records
from rlhf.errors import UserError

_LARGEST_MARGIN = 3.4e38


class Schema(NamedTuple):
    """A kind of data file."""

    name: str
    """Name of its records."""
    flag: str
    """Command-line flag that takes such a file."""
    answers: tuple[str, ...]
    """Keys of the texts that follow `prompt`."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Return all required keys of a record."""
        return ("prompt", *self.answers)


DEMONSTRATIONS = Schema("demonstrations", "--sft-data", ("completion",))
PREFERENCES = Schema("preference pairs", "--preference-data", ("chosen", "rejected"))
PROMPTS = Schema("prompts", "--prompt-data", ())


def check_record(path: Path, record: Record, schema: Schema) -> None:
    """Raise UserError, naming file, record, key and remedy, unless the record has valid texts.

    A prompt may be empty; a completion, chosen or rejected text may not be empty or only white space. Other columns are
    not checked, except `margin`, which must be a number.
    """
    where = f"{path}: record {record.number} (line {record.line})"
    for key in schema.keys:
        if key not in record.fields:
            raise UserError(f"{where} has no key {key!r}; {_remedy(key, record, schema)}")
        text = record.fields[key]
        if not isinstance(text, str):
            if text is None:
                raise UserError(f"{where}: {key!r} is null; fill it in or remove the record")
            got = f"{type(text).__name__} {str(text)[:40]!r}"
            remedy = "each record needs one text" if isinstance(text, list | dict) else "write it in double quotes"
            raise UserError(f"{where}: {key!r} must be a text, got {got}; {remedy}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(text[error.start]):04x}"
            raise UserError(
                f"{where}: {key!r} has the lone surrogate {escape}, which is no character; remove it"
            ) from None
        if key != "prompt" and not text.strip():
            raise UserError(
                f"{where}: {key!r} is {'empty' if not text else 'only white space'}; fill it in or remove the record"
            )
    margin = record.fields.get("margin", 0.0)
    if schema is PREFERENCES and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise UserError(f"{where}: 'margin' must be a number, got {margin!r}; without one leave the key out")
    if schema is PREFERENCES and not -_LARGEST_MARGIN <= margin <= _LARGEST_MARGIN:
        raise UserError(f"{where}: 'margin' must be a number that float32 can hold, got {str(margin)[:40]}")


def _remedy(key: str, record: Record, schema: Schema) -> str:
    names, needed = sorted(record.fields), ", ".join(map(repr, schema.keys))
    for kind in (PREFERENCES, DEMONSTRATIONS):
        if kind is not schema and all(name in record.fields for name in kind.keys):
            return f"it looks like {kind.name}: give the file as {kind.flag}, or give {schema.name} as {schema.flag}"
    for name, value in record.fields.items():
        inner = value[0] if isinstance(value, list) and value else None
        if isinstance(inner, dict) and {"role", "from"} & inner.keys():
            return f"{name!r} is a chat: give its messages as texts, {schema.name} need {needed}"
        if isinstance(inner, dict):
            return f"the records seem to be in the list {name!r}: give that list alone as the file"
    close = difflib.get_close_matches(key, [name for name in names if name not in schema.keys], n=1)
    hint = f"did you mean it by {close[0]!r}? " if close else ""
    got = ", ".join(map(repr, names))
    return f"{hint}{schema.name} need {needed}, found {got or 'nothing'}"


def read_checked(path: Path, schema: Schema) -> Iterator[Record]:
    """Yield a file's records after checking each. Raises as `read_records` and `check_record`."""
    for record in read_records(path):
        check_record(path, record, schema)
        yield record
