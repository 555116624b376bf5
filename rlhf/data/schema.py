"""The three kinds of data file and the checks of their records."""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.conversations import contents_of, is_conversation, problem_of, to_columns
from rlhf.data.data_files import DataFiles, Record, Source, as_data_files, list_files
from rlhf.data.records import read_records
from rlhf.errors import UserError

_LARGEST_MARGIN = 3.4e38
_CHATS = (
    "prompts are read from 'messages', or from 'prompt' as a list of messages",
    "demonstrations are read from 'messages', or from 'prompt' and 'completion' as lists of messages",
    "preference pairs are read from 'chosen' and 'rejected' as lists of messages",
)
"""Columns of conversations, by the number of answers."""
_WRITTEN_LIST = re.compile(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:")
_NOT_IN_CSV = "is a list of messages written as a text, as CSV holds it; write the file as JSON Lines or Parquet"


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

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all columns with a meaning, which may have other names in a file."""
        return (*self.keys, *(("margin",) if len(self.answers) == 2 else ("messages",)))


DEMONSTRATIONS = Schema("demonstrations", "--sft-data", ("completion",))
PREFERENCES = Schema("preference pairs", "--preference-data", ("chosen", "rejected"))
PROMPTS = Schema("prompts", "--prompt-data", ())


def check_record(path: Path, record: Record, schema: Schema) -> None:
    """Raise UserError, naming file, record, key and remedy, unless the record has valid texts or conversations.

    A prompt may be empty; a completion, chosen or rejected text may not be empty or only white space. Other columns are
    not checked, except `margin`, which must be a number.
    """
    where = f"{path}: {record.where}"
    for key in schema.keys:
        if key not in record.fields:
            raise UserError(f"{where} has no key {key!r}; {_remedy(key, record, schema)}")
        value = record.fields[key]
        if is_conversation(value):
            is_prompt = key == "prompt"
            problem = problem_of(value, is_prompt=is_prompt and not _answered(record, schema))
            if not is_prompt and len(schema.answers) == 2 and not problem and value[-1]["role"] != "assistant":
                problem = f"ends with a turn of the role {value[-1]['role']!r}; the assistant's last turn is scored"
            if problem:
                raise UserError(f"{where}: {key!r}: {problem}")
        elif not isinstance(value, str) and not (value == [] and key == "prompt" and schema.answers):
            raise UserError(f"{where}: {key!r} {_type_problem(value)}")
        elif isinstance(value, str) and _WRITTEN_LIST.match(value):
            raise UserError(f"{where}: {key!r} {_NOT_IN_CSV}")
        for text in contents_of(value):
            _check_characters(text, f"{where}: {key!r}")
        if key != "prompt" and isinstance(value, str) and not value.strip():
            raise UserError(
                f"{where}: {key!r} is {'empty' if not value else 'only white space'}; fill it in or remove the record"
            )
    if len({type(record.fields[key]) for key in schema.keys}) > 1:
        forms = ", ".join(f"{k!r} is a {'text' if isinstance(record.fields[k], str) else 'list'}" for k in schema.keys)
        raise UserError(f"{where}: {forms}; give all as texts or all as lists of messages")
    margin = record.fields.get("margin", 0.0)
    if schema is PREFERENCES and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise UserError(f"{where}: 'margin' must be a number, got {margin!r}; without one leave the key out")
    if schema is PREFERENCES and not -_LARGEST_MARGIN <= margin <= _LARGEST_MARGIN:
        raise UserError(f"{where}: 'margin' must be a number that float32 can hold, got {str(margin)[:40]}")


def _answered(record: Record, schema: Schema) -> bool:
    """Return whether the prompt's last turn may be the assistant's, because another turn follows before the answer."""
    first = record.fields.get(schema.answers[0]) if schema.answers else None
    return isinstance(first, list) and is_conversation(first) and first[0]["role"] != "assistant"


def _type_problem(value: Any) -> str:
    if value is None:
        return "is null; fill it in or remove the record"
    remedy = "each record needs one text" if isinstance(value, list | dict) else "write it in double quotes"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        remedy = "if it is a conversation, each turn needs 'role' and 'content'"
    if isinstance(value, dict) and value and all(key.isdigit() for key in value):
        remedy = "pandas wrote columns instead of records: write it by to_json(FILE, orient='records', lines=True)"
    return f"must be a text, got {type(value).__name__} {str(value)[:40]!r}; {remedy}"


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where} has the lone surrogate {escape}, which is not a character; remove it") from None


def _remedy(key: str, record: Record, schema: Schema) -> str:
    names, needed = sorted(record.fields), ", ".join(map(repr, schema.keys))
    for kind in (PREFERENCES, DEMONSTRATIONS):
        if kind is not schema and all(name in record.fields for name in kind.keys):
            return f"it looks like {kind.name}: give the file as {kind.flag}, or give {schema.name} as {schema.flag}"
    for name, value in record.fields.items():
        if isinstance(value, str) and _WRITTEN_LIST.match(value):
            return f"{name!r} {_NOT_IN_CSV}"
        inner = value[0] if isinstance(value, list) and value else None
        if isinstance(inner, dict) and {"role", "from"} & inner.keys():
            form = "" if "role" in inner else "; each of its turns needs 'role' and 'content'"
            return f"{name!r} is a chat: {_CHATS[len(schema.answers)]}{form}"
        if isinstance(inner, dict):
            return f"the records seem to be in the list {name!r}: give that list alone as the file"
    close = difflib.get_close_matches(key, [name for name in names if name not in schema.keys], n=1)
    hint = f"{close[0]!r} looks like a misspelling of it; " if close else ""
    got = ", ".join(map(repr, names))
    columns = "" if hint or not got else f"; if one is named otherwise: --data.columns {key}=COLUMN"
    return f"{hint}{schema.name} need {needed}, found {got or 'nothing'}{columns}"


def read_checked(source: Source, schema: Schema) -> Iterator[Record]:
    """Yield the records of files after checking each; conversations are in the columns that texts have.

    Raises:
        UserError: a file is missing or cannot be read, a record is invalid, a renamed column is missing, or some
            records have texts and others conversations.
    """
    renames = [(name, column) for name, column in as_data_files(source).renames if name in schema.columns]
    numbers = ["margin", *(column for name, column in renames if name == "margin")]
    first: Record | None = None
    for path in list_files(source):
        for record in read_records(path, numbers=numbers):
            fields = rename_columns(record.fields, renames) if renames else record.fields
            try:
                checked = record._replace(fields=to_columns(fields, schema.answers), path=path)
            except ValueError as error:
                raise UserError(f"{path}: {record.where}: {error}") from None
            check_record(path, checked, schema)
            first = first or checked
            if isinstance(checked.fields["prompt"], str) != isinstance(first.fields["prompt"], str):
                forms = ["texts" if isinstance(r.fields["prompt"], str) else "conversations" for r in (checked, first)]
                raise UserError(
                    f"{path}: {record.where} has {forms[0]}, but the first record has {forms[1]}; give one form alone"
                )
            yield checked


def rename_columns(fields: dict[str, Any], renames: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of a record with its columns under the names that they are read as.

    Args:
        fields: the record.
        renames: each (name, column), from `DataFiles.renames`.

    Example:
        >>> rename_columns({"question": "2 + 2?", "source": "a"}, [("prompt", "text"), ("prompt", "question")])
        {'prompt': '2 + 2?', 'source': 'a'}
    """
    columns: dict[str, str] = {}
    for name, column in renames:
        if column in fields:
            columns.setdefault(name, column)
    names = {column: name for name, column in columns.items()}
    return {names.get(key, key): value for key, value in fields.items() if key in names or key not in columns}


def check_renames(sources: Sequence[tuple[DataFiles, Schema]]) -> None:
    """Raise UserError if a column that is named is in none of the files whose kind reads it.

    Args:
        sources: files with their kinds. All records are read only for a column that no first record has.
    """
    for name, column in dict.fromkeys(pair for files, _ in sources for pair in files.renames):
        paths = [path for files, schema in sources if name in schema.columns for path in list_files(files)]
        if paths and not any(_has_column(path, column, most) for most in (1, None) for path in paths):
            found = ", ".join(map(repr, sorted(next(read_records(paths[0])).fields))) or "nothing"
            raise UserError(
                f"--data.columns {name}={column}: no file that is read for {name!r} has a column {column!r}; "
                f"{paths[0]} has {found}"
            )


def _has_column(path: Path, column: str, most: int | None) -> bool:
    """Return whether one of the first `most` records of a file, or of all, has a column."""
    return any(column in record.fields for record in itertools.islice(read_records(path), most))
