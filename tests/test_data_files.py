"""The same records give the same data set from any form, compressed or not, in one file or several."""

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from chat_templates import MARKED, said, user, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.data_files import DataFiles, Source, content_digest, data_files, list_files
from rlhf.data.dataset import load_dataset
from rlhf.data.records import read_records
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, check_renames, read_checked
from rlhf.errors import UserError
from rlhf.io.tokenizer import Tokenizer

pyarrow = pytest.importorskip("pyarrow")

TEXTS = ["the fox", 'a "quoted", text', "line\nend\r\nand\ttab", "é𝄞 日本", " spaces ", "semi;colon|bar"]
PROMPT_RECORDS = [{"prompt": text, "answer": str(number)} for number, text in enumerate(TEXTS)]
PAIRS = [{"prompt": text, "chosen": f"{text}!", "rejected": "no", "margin": n / 2} for n, text in enumerate(TEXTS)]
CHATS = [{"messages": [user(text), said(f"{text}?"), user("so"), said("yes")], "id": n} for n, text in enumerate(TEXTS)]


def as_csv(records: list[dict], delimiter: str = ",") -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, records[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


def as_parquet(records: list[dict]) -> bytes:
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(records), stream, row_group_size=2)
    return stream.getvalue()


def as_arrow(records: list[dict], *, is_stream: bool) -> bytes:
    table, stream = pyarrow.Table.from_pylist(records), io.BytesIO()
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return stream.getvalue()


FORMS = {
    "json": lambda records: json.dumps(records).encode(),
    "jsonl": lambda records: "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode(),
    "parquet": as_parquet,
    "arrow": lambda records: as_arrow(records, is_stream=True),
    "feather": lambda records: as_arrow(records, is_stream=False),
    "csv": as_csv,
    "csv with a BOM": lambda records: b"\xef\xbb\xbf" + as_csv(records),
    "tsv": lambda records: as_csv(records, "\t"),
    "semicolons": lambda records: as_csv(records, ";"),
}


def cached(source: Source, schema, tokenizer: Tokenizer, cache: Path) -> dict[str, bytes]:
    """The files of the cache, by name."""
    load_dataset(source, schema, tokenizer, cache)
    (folder,) = (cache / "datasets").iterdir()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("records", [PROMPT_RECORDS, PAIRS, CHATS], ids=["prompts", "pairs", "chats"])
def test_every_form_gives_the_same_cache_byte_for_byte(tmp_path, records):
    schema = PROMPTS if records is PROMPT_RECORDS else PREFERENCES if records is PAIRS else DEMONSTRATIONS
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "tokenizer", MARKED))
    (tmp_path / "data").write_bytes(FORMS["json"](records))
    expected = cached(tmp_path / "data", schema, tokenizer, tmp_path / "cache")
    assert len(expected["tokens.npy"]) > 200
    for number, (form, write) in enumerate(FORMS.items()):
        if records is CHATS and ("csv" in form or form in ("tsv", "semicolons")):
            continue
        for compressed in (False, True):
            content = write(records)
            path = tmp_path / f"{number}{compressed}"  # no suffix: the content tells
            path.write_bytes(gzip.compress(content) if compressed else content)
            found = cached(path, schema, tokenizer, tmp_path / f"cache{number}{compressed}")
            assert found == expected, (form, compressed)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "README.md").write_text("not data")
    (shards / "state.json").write_text("{}")
    (shards / "part-0.parquet").write_bytes(as_parquet(records[:2]))
    (shards / "part-1.jsonl.gz").write_bytes(gzip.compress(FORMS["jsonl"](records[2:3])))
    (shards / "part-2.json").write_bytes(FORMS["json"](records[3:]))
    assert cached(shards, schema, tokenizer, tmp_path / "of folder") == expected
    several = DataFiles(tuple(list_files(shards)))
    assert cached(several, schema, tokenizer, tmp_path / "of files") == expected
    assert content_digest(several) == content_digest(shards)


def test_columns_of_other_names_give_the_same_cache(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "tokenizer", None))
    names = {"prompt": "question", "chosen": "better", "rejected": "worse", "margin": "by"}
    renamed = [{names[key]: value for key, value in record.items()} for record in PAIRS]
    columns = tuple(f"{name}={column}" for name, column in names.items())
    (tmp_path / "data").write_bytes(FORMS["json"](PAIRS))
    expected = cached(tmp_path / "data", PREFERENCES, tokenizer, tmp_path / "cache")
    for form in ("json", "parquet", "csv"):
        (tmp_path / form).write_bytes(FORMS[form](renamed))
        source = data_files(tmp_path / form, columns)
        assert cached(source, PREFERENCES, tokenizer, tmp_path / f"cache {form}") == expected


def test_a_renamed_column_that_no_file_has_is_named_with_its_flag(tmp_path):
    (tmp_path / "data.json").write_text('[{"q": "a"}, {"question": "b"}]')
    (tmp_path / "more.json").write_text('[{"prompt": "a"}]')

    def check(*columns: str) -> None:
        files = [data_files(tmp_path / name, columns) for name in ("more.json", "data.json")]
        check_renames([(source, PROMPTS) for source in files])

    check("prompt=question")  # which only a later record of the second file has
    check("prompt=q", "completion=answer")  # which no prompt file is read for
    with pytest.raises(UserError) as caught:
        check("prompt=q", "prompt=quest")
    assert str(caught.value) == (
        f"--data.columns prompt=quest: no file that is read for 'prompt' has a column 'quest'; "
        f"{tmp_path}/more.json has 'prompt'"
    )


def test_a_column_is_renamed_where_a_file_has_it_and_the_first_of_several_counts(tmp_path):
    (tmp_path / "data.json").write_text(
        '[{"question": "a", "text": "b"}, {"text": "c", "id": 1}, {"prompt": "d"}, {"prompt": "e", "text": "f"}]'
    )
    source = data_files(tmp_path / "data.json", ("prompt=question", "prompt=text"))
    fields = [record.fields for record in read_checked(source, PROMPTS)]
    assert fields == [{"prompt": "a", "text": "b"}, {"prompt": "c", "id": 1}, {"prompt": "d"}, {"prompt": "f"}]


def test_renaming_replaces_a_column_of_that_name_and_leaves_those_that_a_kind_does_not_read(tmp_path):
    """A prompt file's answers stay the reward function's, whatever the demonstrations call them."""
    (tmp_path / "data.json").write_text('[{"prompt": "old", "question": "new", "answer": "5"}]')
    source = data_files(tmp_path / "data.json", ("prompt=question", "completion=answer"))
    (record,) = read_checked(source, PROMPTS)
    assert record.fields == {"prompt": "new", "answer": "5"}
    (record,) = read_checked(source, DEMONSTRATIONS)
    assert record.fields == {"prompt": "new", "completion": "5"}


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t|"),
    packed=st.booleans(),
)
def test_any_texts_come_back_from_csv_and_parquet(tmp_path_factory, rows, delimiter, packed):
    records = [{"prompt": first, "b": second} for first, second in rows]
    path = tmp_path_factory.getbasetemp() / "any"
    for content in (as_csv(records, delimiter), as_parquet(records)):
        path.write_bytes(gzip.compress(content) if packed else content)
        assert [record.fields for record in read_records(path)] == records


def test_values_of_tables_become_what_json_holds(tmp_path):
    import datetime

    nested = {"text": ["a"], "number": [1.5], "none": [None], "nan": [float("nan")], "day": [datetime.date(2024, 1, 2)]}
    nested |= {"list": [[1, 2]], "object": [{"a": None, "b": [True]}], "bytes": [b"caf\xc3\xa9"]}
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(nested), tmp_path / "x")
    (record,) = read_records(tmp_path / "x")
    assert record.fields["day"] == "2024-01-02"
    assert record.fields["nan"] is None
    assert record.fields["bytes"] == "café"
    assert record.fields["object"] == {"a": None, "b": [True]}
    parquet.write_table(pyarrow.table({"image": [b"\xff\xfe"]}), tmp_path / "x")
    with pytest.raises(UserError, match="the column 'image' holds bytes"):
        list(read_records(tmp_path / "x"))


def test_messages_of_a_table_lose_the_keys_that_they_did_not_have(tmp_path):
    messages = [user("hi"), said("yo") | {"tool_calls": [{"id": "1"}]}]
    (tmp_path / "x").write_bytes(as_parquet([{"messages": messages}]))
    (record,) = read_records(tmp_path / "x")
    assert record.fields["messages"] == messages


REFUSED_FOLDERS = {
    "several splits": (
        ["train-0.parquet", "test-0.parquet"],
        "holds several splits (test, train); name the files of one",
    ),
    "no records": (["README.md", "image.png"], "holds no file of records, expected .json"),
    "a dataset with splits": (["dataset_dict.json"], "holds the splits of a `datasets` folder"),
}


@pytest.mark.parametrize("case", REFUSED_FOLDERS)
def test_folders_that_are_no_data_set_are_refused_with_the_remedy(tmp_path, case):
    names, piece = REFUSED_FOLDERS[case]
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError) as caught:
        list_files(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert piece in str(caught.value)


def test_a_missing_file_among_several_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        list_files(DataFiles((tmp_path / "a.json", tmp_path / "b.json")))


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(as_parquet(PROMPT_RECORDS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"is Parquet, which pyarrow reads; install it: pip install pyarrow"):
        list(read_records(tmp_path / "x"))


def test_bad_rows_of_a_table_are_named_by_record_and_column(tmp_path):
    (tmp_path / "x").write_bytes(
        as_parquet([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}])
    )
    with pytest.raises(UserError, match="x: record 2: 'rejected' is null; fill it in"):
        list(read_checked(tmp_path / "x", PREFERENCES))


MEASURE = """
import resource, sys
from pathlib import Path
from rlhf.data.records import read_records

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

small, large = map(Path, sys.argv[1:])
assert sum(1 for _ in read_records(small)) == 1200
before = peak()
assert sum(1 for _ in read_records(large)) == 50_000
print(peak() - before)
"""


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_fifty_thousand_rows_do_not_stay_in_memory(tmp_path, form):
    rows = [{"prompt": f"word {number} " * 3, "blob": f"{number:06}" * 150} for number in range(50_000)]
    if form == "parquet":
        from pyarrow import parquet

        for name, part in (("small", rows[:1200]), ("large", rows)):
            parquet.write_table(
                pyarrow.Table.from_pylist(part), tmp_path / name, compression="none", use_dictionary=False
            )
    else:
        (tmp_path / "small").write_bytes(as_csv(rows[:1200]))
        (tmp_path / "large").write_bytes(as_csv(rows))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "large").stat().st_size > 40 << 20
    assert float(done.stdout) < 22


def test_several_files_are_paths_of_a_configuration(tmp_path):
    from rlhf.config import DataConfig, SFTRun
    from rlhf.io.paths import absolute_paths, relocate
    from rlhf.io.presets import dump_config, narrow, parse_config

    run = SFTRun(sft_data=["a.json", "b/*.json"], data=DataConfig(template="mine.jinja", columns=("prompt=q",)))
    assert run.sft_data == (Path("a.json"), Path("b/*.json"))
    absolute = absolute_paths(run)
    assert absolute.sft_data == (Path.cwd() / "a.json", Path.cwd() / "b/*.json")
    assert absolute.data.template == str(Path.cwd() / "mine.jinja")
    assert absolute_paths(SFTRun(data=DataConfig(template="plain"))).data.template == "plain"
    assert narrow(parse_config(dump_config(absolute), source="x"), SFTRun) == absolute
    moved = tmp_path / "new" / "run"
    (moved / "checkpoints").mkdir(parents=True)
    (tmp_path / "new" / "a.json").write_text("[]")
    old = SFTRun(output_dir=tmp_path / "old" / "run", sft_data=(tmp_path / "old" / "a.json",))
    assert relocate(old, moved).sft_data == (tmp_path / "new" / "a.json",)


def test_several_files_are_given_as_flags():
    from rlhf.cli.train import parse

    for words in (["--sft-data", "a", "b"], ["--sft-data=a", "--sft-data", "b"]):
        assert parse(["sft", *words]).sft_data == (Path("a"), Path("b"))
    assert parse(["sft", "--sft-data", "a"]).sft_data == Path("a")
    assert parse(["sft"]).sft_data is None
    assert parse(["pipeline", "--data.columns", "prompt=q", "completion=a"]).data.columns == (
        "prompt=q",
        "completion=a",
    )
