"""What a run writes to logs/: whole JSON lines whatever is in them, cut back exactly when a run is resumed."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.io.run_log import FORMAT, RunLog

NASTY = 'a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x00h\r\ni\x7fj\ufeffk𝄞 "\\'


def no_constants(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def lines_of(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes().decode("utf-8")
    assert content == "" or content.endswith("\n")
    return [json.loads(line, parse_constant=no_constants) for line in content.split("\n")[:-1]]


def opened(folder: Path, stage: str = "sft", **options: Any) -> contextlib.closing:
    return contextlib.closing(RunLog(folder, stage, tensorboard=False, **options))


def test_metrics_are_lines_with_stage_step_and_time(tmp_path):
    with opened(tmp_path / "logs") as log:
        log.metrics(1, {"loss/sft": 0.1 + 0.2, "lr": 1e-300})
        log.metrics(2, {"loss/sft": -0.0, "policy/updates": 7})
    first, second = lines_of(tmp_path / "logs" / "metrics.jsonl")
    assert first.pop("time") <= second.pop("time")
    assert first == {"stage": "sft", "step": 1, "loss/sft": 0.1 + 0.2, "lr": 1e-300}
    assert second == {"stage": "sft", "step": 2, "loss/sft": 0.0, "policy/updates": 7}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_values_that_are_not_finite_are_null_wherever_they_stand(tmp_path, value):
    with opened(tmp_path) as log:
        log.metrics(1, {"bad": value, "good": 1.0})
        log.samples(1, [{"prompt": "p", "score": value, "reward/x": 2.0}])
        log.event("end", last=value, nested={"a": [value, 1]})
    metrics, event = lines_of(tmp_path / "metrics.jsonl")
    (sample,) = lines_of(tmp_path / "samples.jsonl")
    assert (metrics["bad"], metrics["good"]) == (None, 1.0)
    assert (sample["score"], sample["reward/x"]) == (None, 2.0)
    assert event["last"] is None


def test_samples_and_events_keep_any_text_on_one_line(tmp_path):
    with opened(tmp_path, "ppo") as log:
        log.samples(3, [{"prompt": NASTY, "completion": NASTY[::-1]}, {"prompt": "", "nested": {"é": [None]}}])
        log.event("start", format=FORMAT, notes=[NASTY])
    first, second = lines_of(tmp_path / "samples.jsonl")
    assert first == {"stage": "ppo", "step": 3, "prompt": NASTY, "completion": NASTY[::-1]}
    assert second == {"stage": "ppo", "step": 3, "prompt": "", "nested": {"é": [None]}}
    (event,) = lines_of(tmp_path / "metrics.jsonl")
    assert (event["event"], event["notes"], event["format"]) == ("start", [NASTY], FORMAT)
    assert "𝄞" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")  # readable by a person


@settings(max_examples=50, deadline=None)
@given(text=st.lists(st.characters() | st.sampled_from(["\ud800", "\udcff"]), max_size=8).map("".join))
def test_any_text_comes_back_lone_surrogates_included(tmp_path_factory, text):
    """A file name that is no UTF-8 reaches the log with surrogates in it."""
    folder = tmp_path_factory.mktemp("log")
    with opened(folder) as log:
        log.samples(1, [{"text": text}])
    (sample,) = lines_of(folder / "samples.jsonl")
    assert sample["text"].encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


def test_every_line_is_on_disk_at_once(tmp_path):
    with opened(tmp_path) as log:
        for step in range(1, 4):
            log.metrics(step, {"x": 1.0})
            log.samples(step, [{"a": 1}])
            assert len(lines_of(tmp_path / "metrics.jsonl")) == step
            assert len(lines_of(tmp_path / "samples.jsonl")) == step


def test_a_new_run_appends(tmp_path):
    for stage in ("sft", "reward"):
        with opened(tmp_path, stage) as log:
            log.metrics(1, {"x": 1.0})
    assert [line["stage"] for line in lines_of(tmp_path / "metrics.jsonl")] == ["sft", "reward"]


def test_resuming_drops_exactly_this_stages_later_lines(tmp_path):
    for stage in ("sft", "ppo"):
        with opened(tmp_path, stage) as log:
            log.event("start", step=0, notes=[NASTY])
            for step in range(1, 6):
                log.metrics(step, {"x": step / 10})
                log.samples(step, [{"prompt": NASTY, "n": n} for n in range(2)])
            log.event("interrupted", step=5)
            log.event("note")
    before = {name: (tmp_path / name).read_bytes().split(b"\n")[:-1] for name in ("metrics.jsonl", "samples.jsonl")}
    with opened(tmp_path, "ppo", after_step=3) as log:
        log.metrics(4, {"x": 44.0})
    for name, lines in before.items():
        kept = [line for line in lines if json.loads(line)["stage"] == "sft" or json.loads(line).get("step", 0) <= 3]
        after = (tmp_path / name).read_bytes().split(b"\n")[:-1]
        assert len(kept) < len(lines)
        assert after[: len(kept)] == kept  # byte for byte
        assert len(after) - len(kept) == (name == "metrics.jsonl")
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["x"] == 44.0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("after_step", [0, 3, 99])
def test_resuming_where_nothing_was_logged_is_fine(tmp_path, after_step):
    with opened(tmp_path / "logs", after_step=after_step) as log:
        log.metrics(after_step + 1, {"x": 1.0})
    assert len(lines_of(tmp_path / "logs" / "metrics.jsonl")) == 1


LINE = json.dumps({"stage": "sft", "step": 1, "text": "é𝄞"}, ensure_ascii=False).encode()


@pytest.mark.parametrize("size", range(1, len(LINE) + 1))
def test_resuming_drops_a_last_line_that_a_crash_cut_off_anywhere(tmp_path, size):
    (tmp_path / "samples.jsonl").write_bytes(LINE + b"\n" + LINE[:size])
    with opened(tmp_path, after_step=5) as log:
        log.samples(6, [{"text": "next"}])
    assert [line["text"] for line in lines_of(tmp_path / "samples.jsonl")] == ["é𝄞", "next"]


@pytest.mark.parametrize(
    "damage", [b"{", b"", b"null", b"5", b"[]", b'"text"', b"\xff\xfe", b'{"stage": "sft", "step": null}']
)
def test_resuming_survives_damaged_lines(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(LINE + b"\n" + damage + b"\n" + LINE + b"\n")
    with opened(tmp_path, after_step=1):
        pass
    kept = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    assert kept.count(LINE) == 2


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_what_we_write_and_resume(tmp_path):
    for after_step, steps in ((None, range(1, 7)), (3, range(4, 6))):
        with contextlib.closing(RunLog(tmp_path, "sft", after_step=after_step)) as log:
            for step in steps:
                log.metrics(step, {"loss/sft": step / 8, "lr": 1.0 if after_step is None else 2.0})
    read = scalars(tmp_path / "tensorboard" / "sft")
    assert read == {
        "loss/sft": [(step, step / 8) for step in range(1, 6)],
        "lr": [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)],
    }


def test_tensorboard_can_be_switched_off_and_stages_do_not_mix(tmp_path):
    with opened(tmp_path) as log:
        log.metrics(1, {"x": 1.0})
    assert not (tmp_path / "tensorboard").exists()
    for stage in ("reward", "ppo"):
        with contextlib.closing(RunLog(tmp_path, stage)) as log:
            log.metrics(1, {f"only/{stage}": math.inf, "x": 3.0})
    assert set(scalars(tmp_path / "tensorboard" / "reward")) == {"only/reward", "x"}
    assert set(scalars(tmp_path / "tensorboard" / "ppo")) == {"only/ppo", "x"}
