"""The table of default runs on real data: what it measures of a run, without running any."""

import json

import pytest
from synthetic_logs import write_log

from benchmarks import real_data


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    labelled = [
        {"text": f"{word} film {n}", "label": label} for n in range(9) for word, label in (("good", 1), ("bad", 0))
    ]
    (folder / "sent_labelled.json").write_text(json.dumps(labelled))
    solved = [{"prompt": "2 + 2?", "completion": " It is\n#### 4"}, {"prompt": "3 + 3?", "completion": "#### 1,006"}]
    (folder / "math_sft_train.json").write_text(json.dumps(solved))
    for name in ("math_pref_train", "math_pref_test"):
        (folder / f"{name}.json").write_text("[]")
    return folder


def test_judges_know_what_they_were_taught(data):
    good, bad = real_data.sentiment(
        [{"prompt": "a good", "completion": " film"}, {"prompt": "a", "completion": " bad"}], data
    )
    assert good > 0 > bad
    samples = [
        {"prompt": "2 + 2?", "completion": "first 3, then 4."},
        {"prompt": "3 + 3?", "completion": "#### 7"},
        {"prompt": "unknown", "completion": "4"},
    ]
    assert real_data.checkable_answer(samples, data) == [1.0, 0.0]


def test_a_run_passes_by_its_problems_kl_and_endings(data, tmp_path):
    def sample(step, row):
        return {
            "prompt": "a",
            "completion": " good" if step > 30 else " bad",
            "score": step,
            "ended": True,
            "tokens": 1,
        }

    verdict = {"event": "verdict", "text": "It rose.", "sound": True}
    write_log(tmp_path / "fine", sample=sample, events=(verdict,))
    result = real_data._measure("sent", 0, tmp_path / "fine", data, 1.0)
    assert result["passed"] is (result["problems"] == [])
    (before, _), (after, _) = result["judge"]
    assert before < after
    assert result["verdicts"] == {"ppo": "It rose."}
    assert "ppo: It rose." in real_data._line(result)
    write_log(tmp_path / "far", sample=sample, figures={"objective/kl": float})
    assert not real_data._measure("sent", 0, tmp_path / "far", data, 1.0)["passed"]


def test_preferred_words_are_those_of_chosen_texts(tmp_path):
    pairs = [
        {"prompt": "a", "chosen": " yes good", "rejected": " no bad"},
        {"prompt": "b", "chosen": " good", "rejected": " bad"},
    ]
    (tmp_path / "hh_helpful_pref_test.json").write_text(json.dumps(pairs))
    samples = [{"completion": text} for text in (" good", " bad", " unknown")]
    good, bad, unknown = real_data.preferred_words(samples, tmp_path)
    assert good > 0 > bad
    assert unknown == 0


def test_every_task_names_files_of_the_shared_data(shared_data):
    for task in real_data.TASKS.values():
        for word in task.command:
            if word.startswith("{data}"):
                assert (shared_data / word.removeprefix("{data}/")).is_file()
