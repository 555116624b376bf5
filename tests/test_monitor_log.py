"""Reading a log while it is written: what was appended, nothing twice, whatever else is in the files."""

import contextlib
import json
import math
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_logs import append, write_log

from rlhf.errors import UserError
from rlhf.io.run_log import FORMAT, RunLog
from rlhf.monitor.log import LogReader

GARBAGE = [b"", b"{", b"null", b"[]", b"5", b'"text"', b"\xff\xfe", b"{}", b'{"stage": 5, "step": 1}', b"[" * 100_000,
           b'{"stage": "ppo"}', b'{"stage": "ppo", "step": -1}', b'{"stage": "ppo", "step": 1.5}',
           b'{"stage": "ppo", "step": true}', b'{"stage": "ppo", "step": ' + b"9" * 5000 + b"}",
           b"Traceback (most recent call last):"]  # fmt: skip


def read(folder) -> LogReader:
    reader = LogReader(folder)
    reader.poll()
    return reader


def contents(reader: LogReader) -> dict:
    """Everything a reader knows, as plain values."""
    metrics = {
        (stage, name): [part.tolist() for part in reader.series(stage, name)]
        for stage in reader.stages
        for name in reader.names(stage)
    }
    return {"metrics": metrics, "events": reader.events, "samples": list(reader.samples), "stages": reader.stages}


def test_reads_what_run_log_writes(tmp_path):
    for stage, steps in (("sft", 3), ("ppo", 4)):
        with contextlib.closing(RunLog(tmp_path / "run" / "logs", stage, tensorboard=False)) as log:
            log.event("start", format=FORMAT, step=0, total=9, unit="iteration", notes=[])
            for step in range(1, steps + 1):
                log.metrics(step, {"x": step / 7, "bad": math.nan, "n": 2})
                log.samples(step, [{"prompt": "p\n", "completion": "c\u2028", "score": 1.5}])
    reader = read(tmp_path / "run")
    assert (reader.name, reader.stages, reader.names("ppo")) == ("run", ["sft", "ppo"], ["x", "bad", "n"])
    steps, values = reader.series("ppo", "x")
    assert (steps.dtype, values.dtype) == (np.int64, np.float64)
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3, 4], [step / 7 for step in range(1, 5)])
    assert np.isnan(reader.series("sft", "bad").values).all()
    assert len(reader.series("ppo", "absent").steps) == len(reader.series("absent", "x").steps) == 0
    assert reader.samples[-1] == {"stage": "ppo", "step": 4, "prompt": "p\n", "completion": "c\u2028", "score": 1.5}
    assert [event["event"] for event in reader.events] == ["start", "start"]
    assert reader.problems == []
    assert reader.progress("ppo")[:4] == (4, 9, "iteration", "running")


@pytest.mark.parametrize(
    ("event", "state"),
    [
        ("end", "ended"),
        ("interrupted", "interrupted"),
        ("nonfinite", "failed"),
        ("failed", "failed"),
        ("fault", "running"),
    ],
)
def test_progress_says_how_the_stage_ended_and_how_fast_it_was(tmp_path, event, state):
    reader = read(write_log(tmp_path, count=9, end=False, events=({"event": event, "step": 9, "time": 1e9 + 99},)))
    progress = reader.progress("ppo")
    assert progress[:5] == (9, 9, "iteration", state, 1e9 + 99)
    assert progress.pace == pytest.approx(1.2)


def test_progress_is_that_of_the_event_where_not_every_step_is_logged(tmp_path):
    events = ({"event": "interrupted", "step": 11, "time": 1e9 + 99},)
    assert read(write_log(tmp_path, count=9, end=False, events=events)).progress("ppo").step == 11


def test_a_fault_after_the_end_does_not_make_a_stage_run_again(tmp_path):
    events = tuple({"event": event, "time": 1e9 + 99} for event in ("end", "fault"))
    assert read(write_log(tmp_path, count=9, end=False, events=events)).progress("ppo").state == "ended"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.floats(0, 1), max_size=6))
def test_following_in_any_pieces_reads_what_reading_at_once_reads(tmp_path_factory, seed, cuts):
    whole = write_log(tmp_path_factory.mktemp("whole"), count=4, seed=seed, samples=2)
    growing = tmp_path_factory.mktemp("growing") / "logs"
    growing.mkdir()
    reader, files = LogReader(growing), ("metrics.jsonl", "samples.jsonl")
    data = {name: (whole / name).read_bytes() for name in files}
    for cut in [*sorted(cuts), 1.0]:
        for name in files:
            with (growing / name).open("ab") as stream:
                stream.write(data[name][stream.tell() : int(cut * len(data[name]))])
        reader.poll()
        assert all(math.isfinite(value) for value in reader.series("ppo", "objective/kl").values)
    assert contents(reader) == contents(read(whole))
    assert reader.generation == 0
    assert reader.poll() is False


def test_a_poll_reads_only_what_was_appended(tmp_path):
    logs = write_log(tmp_path, count=50)
    reader = read(logs)
    before = reader.series("ppo", "objective/kl")
    original = (logs / "metrics.jsonl").read_bytes()
    damaged = bytearray(original)
    damaged[2000:4000] = b"#" * 2000  # what was read is not read again, so nobody notices
    with (logs / "metrics.jsonl").open("r+b") as stream:
        stream.write(damaged)
    append(logs / "metrics.jsonl", "ppo", [{"step": 51, "objective/kl": 7.0}])
    assert reader.poll()
    steps, values = reader.series("ppo", "objective/kl")
    assert steps.tolist() == [*before.steps.tolist(), 51]
    assert values[-1] == 7.0
    assert reader.problems == []
    assert before.values.tolist() == values[:-1].tolist(), "a series handed out earlier is still true"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda line: line[:20])
def test_foreign_lines_are_passed_over_and_told_of(tmp_path, name, garbage):
    logs = write_log(tmp_path, count=3)
    clean = contents(read(logs))
    lines = (logs / name).read_bytes().splitlines(keepends=True)
    (logs / name).write_bytes(b"".join([*lines[:2], garbage + b"\n", *lines[2:]]))
    reader = read(logs)
    assert contents(reader) == clean
    assert len(reader.problems) == bool(garbage)
    assert all(name in problem and "passed over" in problem for problem in reader.problems)


def test_a_last_line_without_its_newline_waits_until_it_is_whole(tmp_path):
    logs = write_log(tmp_path, count=3, end=False)
    line = json.dumps({"stage": "ppo", "step": 4, "objective/kl": 1.25}).encode()
    with (logs / "metrics.jsonl").open("ab") as stream:
        stream.write(line[:30])
        stream.flush()
        reader = read(logs)
        assert len(reader.series("ppo", "objective/kl").steps) == 3
        stream.write(line[30:] + b"\n")
    assert reader.poll()
    assert reader.series("ppo", "objective/kl").values[-1] == 1.25
    assert reader.problems == []


def test_a_resumed_run_removes_lines_and_the_reader_starts_anew(tmp_path):
    logs = write_log(tmp_path, count=8, samples=2, end=False)
    reader = read(logs)
    with contextlib.closing(RunLog(logs, "ppo", after_step=5, tensorboard=False)) as log:
        log.event("resume", format=FORMAT, step=5, total=8, unit="iteration", notes=[])
        log.metrics(6, {"objective/kl": 66.0})
        log.samples(6, [{"prompt": "p", "completion": "c"}])
    assert reader.poll()
    assert reader.generation > 0
    assert reader.series("ppo", "objective/kl").steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert [offset.step for offset in reader.samples.offsets] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert reader.problems == []


@pytest.mark.parametrize("change", ["shorter", "same length", "longer", "removed", "other file"])
def test_a_file_that_is_no_longer_what_it_was_is_read_anew(tmp_path, change):
    logs = write_log(tmp_path / "a", count=6, samples=1)
    other = {"shorter": 3, "same length": 6, "longer": 20, "removed": 0, "other file": 20}[change]
    reader, path = read(logs), logs / "metrics.jsonl"
    content = b"" if not other else (write_log(tmp_path / "b", count=other, seed=5) / "metrics.jsonl").read_bytes()
    if change == "removed":
        path.unlink()
    elif change == "other file":
        (logs / "new").write_bytes(content)
        os.replace(logs / "new", path)
    else:
        path.write_bytes(content)
    assert reader.poll()
    assert reader.generation > 0
    assert len(reader.series("ppo", "objective/kl").steps) == other


def test_a_second_run_in_the_same_files_replaces_the_first_and_is_told_of(tmp_path):
    write_log(tmp_path, count=6, samples=1)
    write_log(tmp_path, stage="sft", count=2, samples=0, figures={"loss/sft": float})
    logs = write_log(tmp_path, count=4, seed=1, samples=1)
    fresh = read(write_log(tmp_path / "fresh", count=4, seed=1, samples=1))
    reader = read(logs)
    assert reader.series("ppo", "objective/kl").values.tolist() == fresh.series("ppo", "objective/kl").values.tolist()
    assert reader.series("sft", "loss/sft").values.tolist() == [1.0, 2.0]
    assert list(reader.samples) == list(fresh.samples)
    assert [event["event"] for event in reader.events if event["stage"] == "ppo"] == ["start", "end"]
    assert reader.problems == [
        "metrics.jsonl: holds more than one run of ppo; the last one is shown",
        "samples.jsonl: holds more than one run of ppo; the last one is shown",
    ]


def test_a_log_of_a_newer_version_is_read_as_far_as_possible_and_told_of(tmp_path):
    append(tmp_path / "metrics.jsonl", "ppo", [{"event": "start", "format": FORMAT + 1}, {"step": 1, "a": 2, "b": {}}])
    reader = read(tmp_path)
    assert reader.names("ppo") == ["a"]
    assert len(reader.problems) == 1
    assert "newer version" in reader.problems[0]


def test_the_log_may_come_later(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    reader = LogReader(tmp_path)
    assert reader.poll() is False
    write_log(tmp_path, count=2)
    assert reader.poll()
    assert reader.stages == ["ppo"]


@pytest.mark.parametrize("form", ["logs", "output folder", "metrics.jsonl"])
def test_a_run_can_be_named_in_several_ways(tmp_path, form):
    logs = write_log(tmp_path / "mine", count=2)
    path = {"logs": logs, "output folder": logs.parent, "metrics.jsonl": logs / "metrics.jsonl"}[form]
    reader = read(path)
    assert (reader.folder, reader.name) == (logs, "mine")


@pytest.mark.parametrize(("made", "piece"), [(False, "no such folder"), (True, "not a run's folder")])
def test_what_is_no_run_is_refused(tmp_path, made, piece):
    folder = tmp_path / "folder"
    if made:
        folder.mkdir()
        (folder / "holiday.txt").write_text("")
    with pytest.raises(UserError, match=piece) as caught:
        LogReader(folder)
    assert "--log-dir" in str(caught.value)


def test_samples_are_read_when_asked_for_and_never_break(tmp_path):
    logs = write_log(tmp_path, count=5, samples=2)
    reader = read(logs)
    expected = [json.loads(line) for line in (logs / "samples.jsonl").read_text().splitlines()]
    assert list(reader.samples) == expected
    assert reader.samples[2:7:2] == expected[2:7:2]
    assert reader.samples[-1] == expected[-1]
    assert reader.samples.at("ppo", 3) == expected[4:6]
    (logs / "samples.jsonl").write_bytes(b"x" * 300)
    assert reader.samples[0] == {"stage": "ppo", "step": 1, "prompt": "", "completion": ""}
    (logs / "samples.jsonl").unlink()
    assert [sample["completion"] for sample in reader.samples] == [""] * 10


def test_sample_lines_of_other_forms_are_taken(tmp_path):
    lines = [{"step": 1, "prompt": None, "completion": 5}, {"completion": "c", "step": 2}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line | {"stage": "x y"}) + "\n" for line in lines))
    (tmp_path / "metrics.jsonl").write_text("")
    reader = read(tmp_path)
    assert [(s["prompt"], s["completion"]) for s in reader.samples] == [("None", "5"), ("", "c")]


def test_numbers_beyond_floats_and_other_values_do_no_harm(tmp_path):
    text = (
        '{"stage": "ppo", "step": 1, "big": 1' + "0" * 400 + ', "inf": Infinity, "text": "x", "flag": true, "y": 1e999}'
    )
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    reader = read(tmp_path)
    assert reader.names("ppo") == ["big", "inf", "y"]
    assert all(np.isnan(reader.series("ppo", name).values).all() for name in reader.names("ppo"))


def test_a_series_grows_like_a_list(tmp_path):
    """Doubling arrays against plain lists, at random moments."""
    rng, expected = random.Random(0), []
    (tmp_path / "metrics.jsonl").write_text("")
    reader = LogReader(tmp_path)
    for _ in range(60):
        new = [(len(expected) + n + 1, rng.random()) for n in range(rng.randrange(12))]
        append(tmp_path / "metrics.jsonl", "ppo", [{"step": step, "x": value} for step, value in new])
        expected += new
        reader.poll()
        if rng.random() < 0.5:
            steps, values = reader.series("ppo", "x")
            assert list(zip(steps.tolist(), values.tolist(), strict=True)) == expected
