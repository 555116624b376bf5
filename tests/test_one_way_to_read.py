"""The same records give the same texts, or the same error, through every door; odd values in logs break no reader."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from rlhf.cli.generate_screen import read_prompts
from rlhf.cli.monitor_live import follow
from test_plots import pipeline

from rlhf.data.records import read_records
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS, read_checked
from rlhf.errors import UserError
from rlhf.evaluate.evaluation_inputs import TestData as DataFile
from rlhf.evaluate.evaluation_inputs import unique_prompts, usable_pairs
from rlhf.monitor.health import findings
from rlhf.monitor.log import read_logs
from rlhf.monitor.plots import write_plots
from rlhf.monitor.report import write_report

ENDS = {"newline": "\n", "both": "\r\n", "return": "\r"}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_lines_end_at_any_of_three_and_at_nothing_else(tmp_path, end):
    texts = ["one", "two\x0bthree", "four\x85five\u2028six\x1cseven"]
    (tmp_path / "prompts.txt").write_bytes(end.join([*texts, ""]).encode())
    assert read_prompts(tmp_path / "prompts.txt") == texts
    records = [{"prompt": text, "line": number} for number, text in enumerate(texts)]
    lines = end.join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "prompts.jsonl").write_bytes((lines + end).encode())
    assert read_prompts(tmp_path / "prompts.jsonl") == texts
    assert [record.line for record in read_records(tmp_path / "prompts.jsonl")] == [1, 2, 3]
    (tmp_path / "bad.jsonl").write_bytes((lines + end + "{").encode())
    with pytest.raises(UserError, match="line 4"):
        list(read_records(tmp_path / "bad.jsonl"))


DOORS = {
    "training": lambda path: list(read_checked(path, PREFERENCES)),
    "evaluation": usable_pairs,
    "prompts": lambda path: unique_prompts(DataFile(path, PREFERENCES, None, "")),
}
BAD = {
    "missing": {"prompt": "a", "chosen": "b"},
    "null": {"prompt": None, "chosen": "b", "rejected": "c"},
    "number": {"prompt": "a", "chosen": 3, "rejected": "c"},
    "empty": {"prompt": "a", "chosen": " ", "rejected": "c"},
    "margin": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"},
}


@pytest.mark.parametrize("record", BAD.values(), ids=BAD)
def test_a_bad_record_is_refused_alike_wherever_it_comes_from(tmp_path, record):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}, record]))
    messages = set()
    for read in DOORS.values():
        with pytest.raises(UserError, match="record 2") as caught:
            read(path)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_pipes_are_refused_in_words(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for schema in (DEMONSTRATIONS, PREFERENCES, PROMPTS):
        with pytest.raises(UserError, match="is a pipe or device, and data are read more than once"):
            list(read_checked(tmp_path / "pipe", schema))


ODD = [[], {}, "text", None, [[1]], {"a": [1]}, True, 10**400, -1, 1.5, ["a"], float("nan")]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, list[dict]]:
    folder = pipeline(tmp_path_factory.mktemp("log"))
    names = ("metrics.jsonl", "samples.jsonl")
    return {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names}


def read_all(folder: Path) -> None:
    """Everything that reads a log."""
    readers = read_logs([folder])
    findings(readers[0])
    for _ in readers[0].samples:
        pass
    follow(folder, Console(file=io.StringIO(), width=100))
    write_report([folder], folder / "report.html", overwrite=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_odd_values_in_logs_break_no_reader(tmp_path, lines, name):
    """Every field of some line has every odd value once."""
    changed = [dict(line) for line in lines[name]]
    fields = sorted({field for line in changed for field in line} - {"stage", "event"})
    number = 0
    for field in fields:
        having = [line for line in changed if field in line]
        for odd in ODD:
            having[-1 - number % len(having)][field] = odd
            number += 1
    (tmp_path / "logs").mkdir()
    for file, kept in (lines | {name: changed}).items():
        (tmp_path / "logs" / file).write_text("".join(json.dumps(line) + "\n" for line in kept))
    read_all(tmp_path / "logs")
    write_plots([tmp_path / "logs"], "all", tmp_path / "plots")


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize("field", ["score", "kl", "ended", "tokens", "per_token", "prompt", "completion"])
def test_an_odd_field_of_all_samples_is_not_taken_for_a_value(tmp_path, lines, field, odd):
    (tmp_path / "logs").mkdir()
    samples = [line | {field: odd} for line in lines["samples.jsonl"][-40:]]
    for file, kept in (lines | {"samples.jsonl": samples}).items():
        (tmp_path / "logs" / file).write_text("".join(json.dumps(line) + "\n" for line in kept))
    (reader,) = read_logs([tmp_path / "logs"])
    findings(reader)
    assert all(isinstance(sample.get("score", 0.0), int | float | None) for sample in reader.samples)


@pytest.mark.parametrize("event", [[], {}, 3, None, True])
def test_an_event_without_a_name_is_passed_over(tmp_path, lines, event):
    (tmp_path / "logs").mkdir()
    odd = {"stage": "ppo", "step": 1, "event": event}
    text = "".join(json.dumps(line) + "\n" for line in [*lines["metrics.jsonl"], odd])
    (tmp_path / "logs" / "metrics.jsonl").write_text(text)
    read_all(tmp_path / "logs")
