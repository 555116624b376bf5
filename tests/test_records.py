"""Reading data files: both forms, any chunk size, and every refusal with its place and remedy."""

import codecs
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data import records
from rlhf.data.records import read_records
from rlhf.errors import UserError

A = {"prompt": "a"}
B = {"prompt": "é\n\u2028𝄞", "n": [1, {"x": None}], "ok": True}
PRETTY = json.dumps([A, B], indent=2, ensure_ascii=False)
LINES = f"{json.dumps(A)}\n{json.dumps(B, ensure_ascii=False)}\n"

FORMS = {
    "list": json.dumps([A, B]),
    "compact list": json.dumps([A, B], separators=(",", ":")),
    "pretty list": PRETTY,
    "pretty list CRLF": PRETTY.replace("\n", "\r\n"),
    "list after blank lines": "\n \t\r\n" + PRETTY,
    "list before blank lines": PRETTY + "\r\n\n ",
    "lines": LINES,
    "lines CRLF": LINES.replace("\n", "\r\n"),
    "lines without the last newline": LINES.rstrip(),
    "lines with empty lines": "\n\n" + LINES.replace("\n", "\n\n \n"),
    "pretty lines": json.dumps(A, indent=1) + "\n" + json.dumps(B, indent=1),
    "lines on one line": json.dumps(A) + " " + json.dumps(B),
    "list with a BOM": "\ufeff" + PRETTY,
    "lines with a BOM": "\ufeff" + LINES,
}


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "data.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def outcome(path: Path) -> tuple[list, str]:
    """(records, message): all that reading a file comes to."""
    found = []
    try:
        for record in read_records(path):
            found.append(record)  # noqa: PERF402 (keeps what was read before an error)
    except UserError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 13, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_read_records_takes_every_form_in_chunks_of_any_size(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    found = list(read_records(written(tmp_path, FORMS[form])))
    assert [record.fields for record in found] == [A, B]
    assert [record.number for record in found] == [1, 2]


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('[{"a": 1}, {"a": 2}]', [1, 1]),
        ('[\n{"a": 1},\n\n{"a": 2}\n]', [2, 4]),
        ('[{\n"a":\n1},\n{"a": 2}, {"a": 3}]', [1, 4, 4]),
        ('\n{"a": 1}\r\n\r\n{"a": "x\\ny"}\n{"a": 3}', [2, 4, 5]),
    ],
)
def test_read_records_knows_the_line_where_a_record_begins(tmp_path, monkeypatch, text, lines, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    assert [record.line for record in read_records(written(tmp_path, text))] == lines


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    objects=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), min_size=1, max_size=6),
    chunk=st.integers(1, 48),
    as_list=st.booleans(),
    indent=st.sampled_from([None, 0, 3]),
    escaped=st.booleans(),
)
def test_read_records_gives_back_any_objects(tmp_path_factory, objects, chunk, as_list, indent, escaped):
    def dump(value: object) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=escaped)

    text = dump(objects) if as_list else "\n".join(map(dump, objects))
    path = written(tmp_path_factory.getbasetemp(), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", chunk)
        assert [record.fields for record in read_records(path)] == objects


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_read_records_takes_records_longer_than_a_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    objects = [{"prompt": character * length} for character, length in (("é", 3000), ("x", 1), ("𝄞", 999))]
    path = written(tmp_path, json.dumps(objects, ensure_ascii=False))
    assert [record.fields for record in read_records(path)] == objects


GOOD = '{"prompt": "x"}'
# what is wrong -> (content, pieces of the message)
REFUSED = {
    "empty": ("", ["is empty", "JSON list"]),
    "only white space": (" \r\n\t\n", ["is empty", "JSON list"]),
    "only a BOM": (codecs.BOM_UTF8, ["is empty", "JSON list"]),
    "empty list": ("[]", ["list is empty", "at least one"]),
    "empty list over lines": ("[\n\n]\n", ["list is empty", "at least one"]),
    "a text": ('"prompt"', ["line 1, column 1", "begins with '\"'", "JSON list"]),
    "a number": ("\n 17", ["line 2, column 2", "begins with '1'", "JSON list"]),
    "prose": ("It was a bright cold day.\n", ["line 1, column 1", "begins with 'I'", "JSON list", "CSV"]),
    "record is a text": (f'[{GOOD},\n"b"]', ["record 2 (line 2)", "a string", "an object"]),
    "record is a number": (f"[{GOOD}, 3.5]", ["record 2 (line 1)", "a number", "an object"]),
    "record is null": (f"[{GOOD},\n\nnull]", ["record 2 (line 3)", "null", "an object"]),
    "record is a list": ("[[1]]", ["record 1 (line 1)", "a list", "an object"]),
    "record is true": ("[true]", ["record 1 (line 1)", "a boolean", "an object"]),
    "line is a list": (f"{GOOD}\n[{GOOD}]", ["record 2 (line 2)", "a list", "an object"]),
    "cut in a text": (f'[\n{GOOD},\n{{"prompt": "on', ["line 3, column 12", "record 2", "cut off"]),
    "cut in a key": ('[{"prom', ["line 1, column 3", "record 1", "cut off"]),
    "cut behind a key": ('[{"prompt"', ["line 1, column 11", "record 1", "cut off"]),
    "cut behind a value": (f"[{GOOD[:-1]}", ["line 1, column 16", "record 1", "cut off"]),
    "cut in an escape": ('[{"prompt": "\\u00', ["line 1", "record 1", "not valid JSON"]),
    "cut behind a record": (f"[\n{GOOD}\n", ["line 3, column 1", "after record 1", "']'", "cut off"]),
    "cut behind a comma": (f"[{GOOD},", ["line 1, column 18", "record 2", "cut off"]),
    "lines cut": (f'{GOOD}\n{GOOD}\n{{"prompt": ', ["line 3, column 12", "record 3", "cut off"]),
    "comma before the end": (f"[{GOOD},\n]", ["line 2, column 1", "comma", "remove it"]),
    "comma between lines": (f"{GOOD},\n{GOOD},\n", ["line 1, column 16", "a comma follows record 1", "remove"]),
    "gzip cut off": (gzip.compress(f"{GOOD}\n".encode() * 99)[:-9], ["compressed", "cut off", "fetch it again"]),
    "gzip damaged": (gzip.compress(f"{GOOD}\n".encode())[:-8] + b"\0" * 8, ["compressed", "damaged"]),
    "gzip of nothing": (gzip.compress(b""), ["is empty"]),
    "comma in a record": ('[{"prompt": "x",}]', ["line 1, column 1", "record 1", "not valid JSON"]),
    "no comma": (f"[{GOOD}\n{GOOD}]", ["line 2, column 1", "after record 1", "','"]),
    "text behind the list": (f"[{GOOD}]\n{GOOD}", ["line 2, column 1", "closing ']'", "remove it"]),
    "two lists": (f"[{GOOD}][{GOOD}]", ["line 1, column 18", "closing ']'", "remove it"]),
    "bracket too many": (f"{GOOD}]", ["line 1, column 16", "record 2", "not valid JSON"]),
    "single quotes": ("[{'prompt': 'x'}]", ["line 1, column 3", "record 1", "not valid JSON", "double quotes"]),
    "no quotes": ("[{prompt: 1}]", ["line 1, column 3", "record 1", "not valid JSON", "double quotes"]),
    "open quote": (f'[{{"prompt": "x}},\n{GOOD}]', ["line 1, column 17", "record 1", "control character"]),
    "raw control character": ('[{"prompt": "a\tb"}]', ["line 1, column 15", "record 1", "control character"]),
    "comment": (f"[{GOOD}, // two\n{GOOD}]", ["line 1, column 19", "record 2", "not valid JSON"]),
    "NaN": ('[{"prompt": "x", "n": NaN}]', ["record 1", "NaN", "null or a number"]),
    "Infinity": (f'{GOOD}\n{{"n": Infinity}}', ["line 2", "record 2", "Infinity", "null or a number"]),
    "-Infinity": ('[{"n": [-Infinity]}]', ["record 1", "-Infinity", "null or a number"]),
    "duplicate key": (f'[{GOOD}, {{"a": 1, "b": 2, "a": 3}}]', ["record 2", "'a' twice", "keep one"]),
    "nested duplicate key": ('[{"n": {"b": 2, "b": 2}}]', ["record 1", "'b' twice", "keep one"]),
    "too deep": ('[{"n": ' + "[" * 100_000, ["record 1", "nested too deeply"]),
    "Latin-1": (f'[{GOOD},\n{{"prompt": "é"}}]'.encode("latin-1"), ["line 2", "0xe9", "not UTF-8", "save"]),
    "cut character": (f'[{GOOD},\n{{"prompt": "é'.encode()[:-1], ["line 2", "0xc3", "not UTF-8", "save"]),
    "overlong": (b'[{"prompt": "\xc0\xaf"}]', ["line 1", "0xc0", "not UTF-8", "save"]),
    "surrogate bytes": (b'\n[{"prompt": "\xed\xa0\x80"}]', ["line 2", "0xed", "not UTF-8", "save"]),
    "UTF-16": (f"[{GOOD}]".encode("utf-16"), ["UTF-16", "expected UTF-8", "iconv"]),
    "UTF-16 big": (codecs.BOM_UTF16_BE + f"[{GOOD}]".encode("utf-16-be"), ["UTF-16", "expected UTF-8", "iconv"]),
    "UTF-16 without BOM": (f"[{GOOD}]".encode("utf-16-le"), ["UTF-16", "UTF-8", "convert"]),
    "UTF-16 big without BOM": (f"[{GOOD}]".encode("utf-16-be"), ["UTF-16", "UTF-8", "convert"]),
    "UTF-32": (f"[{GOOD}]".encode("utf-32"), ["UTF-", "expected UTF-8", "iconv"]),
    "Parquet": (b"PAR1\x15\x04", ["Parquet", "damaged"]),
    "Arrow": (b"ARROW1\0\0", ["Arrow", "damaged"]),
    "Arrow of datasets": (b"\xff" * 4 + b"\x10\0\0\0", ["Arrow", "damaged"]),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer", "git lfs pull"]),
    "Zstandard": (b"\x28\xb5\x2f\xfd\x04", ["compressed", "unzstd"]),
    "zip": (b"PK\x03\x04\x14", ["zip archive"]),
    "bzip2": (b"BZh91AY", ["bzip2", "bunzip2"]),
    "CSV without rows": ("prompt,completion\n", ["no row", "at least one"]),
    "CSV with a value too many": ("prompt,completion\na,b\nc,d,e\n", ["record 2 (line 3)", "3 values", "2 columns"]),
    "CSV with an open quote": ('prompt,completion\na,"b\n', ["line 2", "not valid CSV", "double quotes"]),
    "CSV with one name twice": ("prompt,a,prompt\n1,2,3\n", ["line 1", "'prompt'", "keep one"]),
    "CSV in Latin-1": ("prompt,n\né,1\n".encode("latin-1"), ["0xe9", "not UTF-8", "save"]),
    "NUL": (f'[{GOOD}, {{"prompt": "\0"}}]', ["NUL", "UTF-8"]),
    "an endless number": ('[{"n": ' + "7" * 5000 + "}]", ["record 1", "number"]),
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("wrong", REFUSED)
def test_read_records_refuses(tmp_path, monkeypatch, wrong, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    content, pieces = REFUSED[wrong]
    path = written(tmp_path, content)
    with pytest.raises(UserError) as caught:
        list(read_records(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for piece in pieces:
        assert piece in message
    assert len(message) < 400  # one message, not the file


@pytest.mark.parametrize("chunk", [1, 64, 1000, 1 << 20])
@pytest.mark.parametrize("separator", [",\n", ", "], ids=["lines", "one line"])
def test_read_records_points_at_an_error_far_behind_the_first_chunk(tmp_path, monkeypatch, chunk, separator):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    good = [json.dumps({"prompt": "ü" * (number % 37)}, ensure_ascii=False) for number in range(300)]
    before = "[" + separator.join(good) + separator + '{"prompt": "ü", "x": '
    with pytest.raises(UserError, match="record 301 is not valid JSON") as caught:
        list(read_records(written(tmp_path, before + 'nope}, {"prompt": "more"}]')))
    line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    assert f": line {line}, column {column}: " in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_read_records_yields_what_stands_before_the_error(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(records, "_CHUNK", chunk)
    found, message = outcome(written(tmp_path, f"{GOOD}\n" * 40 + "{"))
    assert len(found) == 40
    assert "line 41" in message
    assert "record 41" in message


SAMPLE = json.dumps([A, B, {"margin": -1.5e3, "t": '\\ " \u00e9'}], ensure_ascii=False, indent=1)


@settings(max_examples=300, deadline=None)
@given(
    place=st.integers(0, len(SAMPLE)),
    removed=st.integers(0, 6),
    inserted=st.text(st.sampled_from('[]{}",:\\ \n1-+.eE0tfnN/é'), max_size=4),
    chunk=st.integers(1, 30),
)
def test_read_records_never_fails_otherwise_and_never_by_chunk(tmp_path_factory, place, removed, inserted, chunk):
    """A damaged file gives records or a UserError, and the same ones however it is read."""
    path = written(tmp_path_factory.getbasetemp(), SAMPLE[:place] + inserted + SAMPLE[place + removed :])
    whole = outcome(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", chunk)
        assert outcome(path) == whole


def test_read_records_names_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json: no such file"):
        list(read_records(tmp_path / "missing.json"))
    with pytest.raises(UserError, match="not a file"):
        list(read_records(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see open files")
@pytest.mark.parametrize("content", [f"{GOOD}\n{GOOD}\n[", f"[{GOOD},\n{GOOD}]"], ids=["bad", "good"])
def test_read_records_leaves_no_file_open(tmp_path, content):
    def is_open(path: Path) -> bool:
        links = Path("/proc/self/fd").iterdir()
        return any(os.path.realpath(link) == os.path.realpath(path) for link in links)

    path = written(tmp_path, content)
    reading = read_records(path)
    next(reading)
    assert is_open(path)  # or the test proves nothing
    reading.close()
    assert not is_open(path), "closing the generator early leaves the file open"
    with pytest.raises((UserError, StopIteration)) as caught:  # noqa: PT012 (the traceback keeps all frames alive)
        reading = read_records(path)
        while True:
            next(reading)
    assert caught.value is not None
    assert not is_open(path), "the file stays open after the last record or an error"
