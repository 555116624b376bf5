"""The health checks: each finds its fault in a log that has it, and nothing in healthy logs with noise."""

import dataclasses
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic_logs import completion, healthy, write_log

from rlhf.config import PipelineRun
from rlhf.errors import UserError
from rlhf.monitor.diagnostics import over_optimisation, recent
from rlhf.monitor.health import CHECKS, Finding, findings
from rlhf.monitor.log import LogReader, Series
from rlhf.monitor.sample_diagnostics import word_repetition
from rlhf.monitor.thresholds import LEVELS, THRESHOLDS, Threshold, worst

COUNT = 60


def check(folder: Path, name: str, stage: str = "ppo") -> Finding:
    reader = LogReader(folder)
    reader.poll()
    (found,) = [finding for finding in findings(reader) if (finding.check, finding.stage) == (name, stage)]
    return found


def rising(step: int) -> float:
    return step / COUNT


def saying(text: str):
    return lambda step, row: completion(step, row) | {"completion": text}


def scored(score):
    return lambda step, row: completion(step, row) | {"score": score(step, row)}


def fault(step: int, **facts) -> dict:
    return {"event": "fault", "step": step, "what": "worker 1", "recovery_s": 2.5, "final": False} | facts


REFUSED = {"event": "nonfinite", "step": 59, "message": "loss is nan"}
REWARD = {"loss/reward": lambda step: 0.6, "eval/reward/accuracy": lambda step: 0.7,
          "eval/reward/length_correlation": lambda step: 0.2}  # fmt: skip
SFT = {"loss/sft": lambda step: 1.0, "eval/loss": lambda step: 2.0 - rising(step)}

FAULTS = {
    "KL below 0": ("negative-kl", "problem", {"figures": {"objective/kl": lambda step: -2 - 0.1 * (step % 3)}}),
    "KL a little below 0": ("negative-kl", "warning", {"figures": {"objective/kl": lambda step: -0.2}}),
    "KL far too high": ("kl-explosion", "problem", {"figures": {"objective/kl": lambda step: 60.0 * rising(step)}}),
    "KL high": ("kl-explosion", "warning", {"figures": {"objective/kl": lambda step: 17.0}}),
    "KL that doubles again and again": (
        "kl-explosion", "warning", {"figures": {"objective/kl": lambda step: 0.2 * math.exp(4 * rising(step))}},
    ),
    "ratio off once": (
        "first-ratio", "problem", {"figures": {"val/ratio_first": lambda step: 1.2 if step == 7 else 1.0}},
    ),
    "ratio off a little": ("first-ratio", "warning", {"figures": {"val/ratio_first": lambda step: 0.98}}),
    "most tokens clipped": ("clip-fraction", "problem", {"figures": {"policy/clipfrac_avg": lambda step: 0.6}}),
    "many tokens clipped": ("clip-fraction", "warning", {"figures": {"policy/clipfrac_avg": lambda step: 0.35}}),
    "giant updates": ("approx-kl", "problem", {"figures": {"policy/approxkl_avg": lambda step: 0.9}}),
    "large updates": ("approx-kl", "warning", {"figures": {"policy/approxkl_avg": lambda step: 0.2}}),
    "entropy gone": (
        "entropy-collapse", "problem", {"figures": {"policy/entropy_avg": lambda step: math.exp(-6 * rising(step))}},
    ),
    "entropy low": (
        "entropy-collapse", "warning", {"figures": {"policy/entropy_avg": lambda step: math.exp(-2.2 * rising(step))}},
    ),
    "ever longer": (
        "length-drift", "warning", {"figures": {"response_length/mean": lambda step: 20 + 40 * rising(step)}},
    ),
    "longer and longer": (
        "length-drift", "problem", {"figures": {"response_length/mean": lambda step: 20 + 120 * rising(step)}},
    ),
    "ever shorter": (
        "length-drift", "problem", {"figures": {"response_length/mean": lambda step: 20 * math.exp(-3 * rising(step))}},
    ),
    "gold falls while the score rises": (
        "over-optimisation", "problem",
        {"figures": {"gold/judge": lambda step: 3 * rising(step) * (1.2 - rising(step)) + 0.02 * (step % 3)}},
    ),
    "gold falls from the first": (
        "over-optimisation", "problem", {"figures": {"gold/judge": lambda step: -rising(step) + 0.02 * (step % 3)}},
    ),
    "values worse than their mean": (
        "value-function", "problem", {"figures": {"val/explained_variance": lambda step: -2.0}},
    ),
    "values no better than their mean": (
        "value-function", "warning", {"figures": {"val/explained_variance": lambda step: -0.05}},
    ),
    "one reward for all": ("constant-rewards", "problem", {"sample": scored(lambda step, row: 10.0)}),
    "nearly one reward for all": (
        "constant-rewards", "warning", {"sample": scored(lambda step, row: 1.0 if step % 2 or row else 0.0)},
    ),
    "groups of equal scores": (
        "equal-groups", "problem", {"figures": {"objective/equal_groups": lambda step: 0.5 + 0.5 * rising(step)}},
    ),
    "many groups of equal scores": (
        "equal-groups", "warning", {"figures": {"objective/equal_groups": lambda step: 0.6 + 0.1 * (step % 2)}},
    ),
    "words again and again": ("repeated-text", "problem", {"sample": saying("very " * 40)}),
    "one answer to everything": ("repeated-text", "problem", {"sample": saying("I cannot help with this today.")}),
    "never ends": ("unfinished", "problem", {"figures": {"response_length/ended": lambda step: 0.1}}),
    "often does not end": ("unfinished", "warning", {"figures": {"response_length/ended": lambda step: 0.7}}),
    "slow": (
        "throughput", "problem", {"figures": {"perf/tokens_per_s": lambda step: 2000 if step < 45 else 300}},
    ),
    "slower": (
        "throughput", "warning", {"figures": {"perf/tokens_per_s": lambda step: 2000 if step < 45 else 900}},
    ),
    "a worker lost": ("recoveries", "warning", {"events": (fault(7), fault(9))}),
    "too many workers lost": (
        "recoveries", "problem", {"events": (fault(7, final=True), {"event": "interrupted", "step": 7}), "end": False},
    ),
    "too many workers lost, and resumed": (
        "recoveries", "warning", {"events": (fault(7, final=True), {"event": "resume", "step": 7})},
    ),
    "an update refused": ("not-finite", "problem", {"events": (REFUSED,), "end": False}),
    "an update refused, and resumed": ("not-finite", "warning", {"events": (REFUSED, {"event": "resume", "step": 59})}),
    "an update refused, and stopped by an error since": (
        "not-finite", "warning",
        {"events": (REFUSED, {"event": "resume", "step": 59}, {"event": "failed", "step": 60}), "end": False},
    ),
    "a figure that is not finite": ("not-finite", "warning", {"figures": {"loss/value_avg": lambda step: None}}),
    "accuracy of a coin": (
        "reward-model-chance", "problem",
        {"stage": "reward", "figures": REWARD | {"eval/reward/accuracy": lambda step: 0.5}},
    ),
    "accuracy of a coin, of too few pairs": (
        "reward-model-chance", "warning",
        {
            "stage": "reward",
            "figures": REWARD | {"eval/reward/accuracy": lambda step: 0.5, "eval/reward/pairs": lambda step: 30},
        },
    ),
    "accuracy of a coin, of enough pairs": (
        "reward-model-chance", "problem",
        {
            "stage": "reward",
            "figures": REWARD | {"eval/reward/accuracy": lambda step: 0.5, "eval/reward/pairs": lambda step: 300},
        },
    ),
    "accuracy hardly better": (
        "reward-model-chance", "warning",
        {"stage": "reward", "figures": REWARD | {"eval/reward/accuracy": lambda step: 0.54}},
    ),
    "reward that counts tokens": (
        "reward-model-length", "problem",
        {"stage": "reward", "figures": REWARD | {"eval/reward/length_correlation": lambda step: -0.8}},
    ),
    "reward that looks at length": (
        "reward-model-length", "warning",
        {"stage": "reward", "figures": REWARD | {"eval/reward/length_correlation": lambda step: 0.6}},
    ),
    "records learnt by heart": (
        "overfitting", "problem", {"stage": "sft", "figures": SFT | {"eval/loss": lambda step: 1 + rising(step)}},
    ),
    "records nearly learnt by heart": (
        "overfitting", "warning", {"stage": "sft", "figures": SFT | {"eval/loss": lambda step: 1 + 0.1 * rising(step)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_explained(tmp_path, name):
    wanted, level, changes = FAULTS[name]
    stage = changes.get("stage", "ppo")
    found = check(write_log(tmp_path, count=COUNT, **changes), wanted, stage)
    assert found.level == level, found
    assert found.summary
    assert found.evidence
    assert found.cause
    assert "--" in found.advice or "timing_s" in found.advice
    assert found.steps is None or 0 < found.steps[0] <= found.steps[1] <= COUNT
    clean = {"ppo": {"objective/equal_groups": lambda step: 0.2}, "reward": REWARD, "sft": SFT}[stage]
    assert check(write_log(tmp_path / "clean", count=COUNT, stage=stage, figures=clean), wanted, stage).level == "ok"


def test_every_check_and_threshold_is_tried_by_a_fault():
    assert {wanted for wanted, _, _ in FAULTS.values()} == {known.name for known in CHECKS}
    folder = Path(__file__).parents[1] / "rlhf" / "monitor"
    code = "".join(path.read_text() for path in folder.glob("*diagnostics.py"))
    assert all(f'"{name}"' in code for name in THRESHOLDS)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 20, 60, 400])
@pytest.mark.parametrize("seed", range(6))
def test_noise_is_no_finding(tmp_path, count, seed):
    reader = LogReader(write_log(tmp_path, count=count, seed=seed, samples=4))
    reader.poll()
    found = findings(reader)
    assert {finding.level for finding in found} <= {"ok", "unknown"}, [f for f in found if f.level != "ok"]
    if count >= 20:
        assert {finding.level for finding in found} == {"ok"}


class Noise:
    """A log of 20 lines in which the gold score is noise and the optimised one rises."""

    def __init__(self, seed: int) -> None:
        self.gold = np.random.default_rng(seed).normal(size=20)

    def names(self, stage: str) -> list[str]:
        return ["gold/judge"]

    def series(self, stage: str, name: str) -> Series:
        steps = np.arange(1, 21)
        return Series(steps, self.gold if name == "gold/judge" else steps.astype(float))


def test_over_optimisation_is_seen_in_noise_as_rarely_as_its_threshold_says():
    """One short run of a thousand: 4 of 4,000 expected."""
    names = ("gold/judge", "objective/scores")
    assert sum(over_optimisation(Noise(seed), "ppo", *names).level != "ok" for seed in range(4000)) <= 10


def test_a_spike_that_passed_is_told_and_no_fault(tmp_path):
    """As in the demo, whose KL is 51 nats at iteration 2 and 4 at the end."""
    usual = healthy(COUNT)["objective/kl"]
    found = check(
        write_log(tmp_path, figures={"objective/kl": lambda step: 64.0 if step == 2 else usual(step)}), "kl-explosion"
    )
    assert found.level == "ok"
    assert "64 at step 2" in found.summary


@pytest.mark.parametrize("name", ["gold/judge", "val/ratio_first", "objective/kl", "policy/entropy_avg"])
def test_what_is_not_in_the_log_is_unknown(tmp_path, name):
    lines = (write_log(tmp_path) / "metrics.jsonl").read_text()
    (tmp_path / "logs" / "metrics.jsonl").write_text(re.sub(rf'"{name}": [^,]+, ', "", lines))
    reader = LogReader(tmp_path)
    reader.poll()
    unknown = [finding for finding in findings(reader) if finding.level == "unknown"]
    assert unknown
    assert all("not in the log" in finding.summary or "no gold score" in finding.summary for finding in unknown)


def test_a_single_update_an_iteration_is_the_first(tmp_path):
    figures = {"policy/updates": lambda step: 1, "val/ratio": lambda step: 1.3}
    logs = write_log(tmp_path, figures=figures)
    text = (logs / "metrics.jsonl").read_text()
    (logs / "metrics.jsonl").write_text(re.sub(r'"val/ratio_first": [^,]+, ', "", text))
    assert check(logs, "first-ratio").level == "problem"


def test_an_undefined_correlation_is_unknown_and_no_overflow(tmp_path):
    """As of one held-out pair whose texts are of one length."""
    logs = write_log(
        tmp_path, stage="reward", figures=REWARD | {"eval/reward/length_correlation": lambda step: None}, samples=0
    )
    assert check(logs, "not-finite", "reward").level == "ok"
    assert check(logs, "reward-model-length", "reward").level == "unknown"


def test_problems_come_first(tmp_path):
    figures = {"objective/kl": lambda step: -2.0, "policy/clipfrac_avg": lambda step: 0.35}
    reader = LogReader(write_log(tmp_path, figures=figures))
    reader.poll()
    levels = [LEVELS.index(finding.level) for finding in findings(reader)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == LEVELS.index("problem")


def test_nothing_read_gives_no_finding(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert findings(LogReader(tmp_path)) == []


def test_a_stage_of_another_program_is_not_judged(tmp_path):
    reader = LogReader(write_log(tmp_path, stage="pretraining", figures={"loss": rising}, samples=0))
    reader.poll()
    assert findings(reader) == []


def test_hostile_events_and_samples_do_no_harm(tmp_path):
    events = ({"event": "fault", "recovery_s": "x", "step": 3}, {"event": "fault"}, {"event": "nonfinite", "step": 4})
    sample = {"prompt": "\x1b[31m", "completion": "\u202e$x$", "score": None}
    logs = write_log(tmp_path, events=events, sample=lambda step, row: dict(sample), end=False)
    reader = LogReader(logs)
    reader.poll()
    levels = {finding.check: finding.level for finding in findings(reader)}
    assert levels["recoveries"] == "warning"
    assert levels["not-finite"] == "problem"
    assert levels["constant-rewards"] == "problem"


def test_threshold_levels_and_their_order():
    high, low = Threshold(1.0, 2.0, ""), Threshold(0.5, 0.1, "")
    assert [high.level(value) for value in (0.9, 1.0, 1.9, 2.0)] == ["ok", "warning", "warning", "problem"]
    assert [low.level(value) for value in (0.6, 0.5, 0.2, 0.1)] == ["ok", "warning", "warning", "problem"]
    assert worst("ok", "problem", "warning") == "problem"
    assert worst("ok", "unknown") == "unknown"


@pytest.mark.parametrize("name", THRESHOLDS)
def test_every_threshold_names_its_source(name):
    assert re.search(r"et al\.|TRL|\bours?\b|by definition|the mean of", THRESHOLDS[name].source)


def test_advice_names_settings_that_exist():
    text = " ".join(known.advice for known in CHECKS)
    for section, setting in re.findall(r"--(ppo|reward|sft|dist)\.([a-z-]+)", text):
        names = {spec.name for spec in dataclasses.fields(type(getattr(PipelineRun(), section)))}
        assert setting.removeprefix("no-").replace("-", "_") in names, f"{section}.{setting}"
    assert set(re.findall(r"--([a-z-]+)(?![a-z.-])", text)) == {"precision", "preference-data"}


def test_word_repetition_counts_4_grams_that_were_there_before():
    assert word_repetition("a b c d e f") == 0.0
    assert word_repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert word_repetition("no no no no no no no") == pytest.approx(3 / 4)
    assert word_repetition("") == word_repetition("a b c") == 0.0
    rng = random.Random(0)
    assert word_repetition("".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(60))) == 0.0
    assert word_repetition("你好" * 30) > 0.9, "text without spaces is taken by characters"


@pytest.mark.parametrize(("count", "taken"), [(3, 3), (5, 5), (49, 5), (100, 10), (10_000, 50)])
def test_recent_is_a_tenth_within_bounds(count, taken):
    series = Series(*(list(range(count)),) * 2)
    assert recent(series).steps == list(range(count))[-taken:]


def cli(*arguments: str) -> int:
    from rlhf.cli.monitor import main

    return main(list(arguments))


def test_the_program_prints_findings_and_ends_with_1_for_a_problem(tmp_path, capsys):
    good = write_log(tmp_path / "good")
    bad = write_log(tmp_path / "bad", figures={"objective/kl": lambda step: -2.0})
    assert cli("--log-dir", str(good), "--check") == 0
    out = capsys.readouterr().out
    assert f"good: {len([c for c in CHECKS if 'ppo' in c.stages])} ok" in out
    assert cli("--log-dir", str(good), str(bad), "--check") == 1
    out = capsys.readouterr().out
    assert "PROBLEM ppo negative-kl: KL is -2 nats per completion" in out
    assert "--ppo.top-k 0" in out
    assert "likely cause" in out
    warned = write_log(tmp_path / "warned", figures={"policy/clipfrac_avg": lambda step: 0.35})
    assert cli("--log-dir", str(warned), "--check") == 0


def test_a_stage_name_cannot_steer_the_terminal(tmp_path, capsys):
    for _ in range(2):
        logs = write_log(tmp_path, stage="x\x1by", figures={"a": float}, samples=0)
    assert cli("--log-dir", str(logs), "--check") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"more than one run of x\x1by" in out


@pytest.mark.parametrize("content", ["", "Traceback\n", '{"stage": 1}\n'])
@pytest.mark.parametrize("action", [["--check"], ["--report"], ["--plot-type", "all"]])
def test_the_program_refuses_a_log_without_a_line_of_ours(tmp_path, capsys, content, action):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert cli("--log-dir", str(tmp_path), *action) == 2
    assert "nothing to show yet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_program_refuses_folders_and_flags_that_do_not_fit(tmp_path, capsys):
    assert cli("--log-dir", str(tmp_path / "absent"), "--check") == 2
    assert "no such folder" in capsys.readouterr().err
    logs = str(write_log(tmp_path, count=3))
    assert cli("--log-dir", logs, "--check", "--live") == 2
    assert "--live and --check: one at a time" in capsys.readouterr().err
    assert cli("--log-dir", logs, logs, "--live") == 2
    assert "one run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli("--log-dir", logs, "--plot-type", "everything")
    assert caught.value.code == 2


def test_unknown_errors_are_user_errors(tmp_path):
    with pytest.raises(UserError):
        LogReader(tmp_path / "absent")


@pytest.mark.parametrize("name", ["approx-kl", "clip-fraction"])
def test_one_update_per_iteration_tells_nothing_of_its_size(tmp_path, name):
    write_log(tmp_path, figures={"policy/updates": lambda step: 1.0})
    found = check(tmp_path, name)
    assert found.level == "unknown"
    assert "one update" in found.summary + found.evidence
