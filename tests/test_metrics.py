"""The table of metrics: it has all that is logged, and whatever shows a metric reads it there."""

import ast
import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rlhf.cli.evaluate_tables import show_report
from rlhf.cli.monitor_live import dashboard
from synthetic_logs import write_log

from rlhf.data.schema import DEMONSTRATIONS
from rlhf.evaluate.estimates import Figure
from rlhf.evaluate.evaluation import Report
from rlhf.evaluate.evaluation_inputs import TestData as DataFile
from rlhf.evaluate.evaluation_result import Evaluation
from rlhf.metrics import METRICS, Metric, describe, in_order, is_registered, register
from rlhf.monitor.charts import OTHERS, QUESTIONS, SCATTERS, charts, curve_label
from rlhf.monitor.health import CHECKS, findings
from rlhf.monitor.log import LogReader
from rlhf.monitor.plots import drawings
from rlhf.monitor.view import metric_table

ROOT = Path(__file__).parents[1] / "rlhf"
LOGGING = [path for folder in ("train", "execution", "evaluate") for path in sorted((ROOT / folder).rglob("*.py"))]
LOGGING += [ROOT / "losses.py", ROOT / "policy_losses.py", ROOT / "preference_losses.py", ROOT / "experience.py"]
OF_PAIRS = ("accuracy", "margin", "min", "mean", "max", "length_correlation")
BUILT = {f"{prefix}/reward/{name}" for prefix in ("eval", "train") for name in OF_PAIRS}
BUILT |= {f"eval/objective/kl{suffix}" for suffix in ("", "_exact", "_k2", "_k3")}
OF_DPO = ("loss/dpo", "loss/ipo", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
BUILT |= {f"eval/{name}" for name in OF_DPO}
BUILT |= {f"eval/distinct_{n}" for n in (1, 2, 3)} | {"grad_norm", "lr"}
"""Keys that the code puts together, or that have no part before a slash."""


def literals() -> set[str]:
    """String constants of the modules that log and evaluate which look like a metric's key."""
    found = set()
    for path in LOGGING:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    keys = {text for text in found if re.fullmatch(r"[a-z_]+(/[a-z_0-9]*[a-z0-9])+", text)}
    return {key.removesuffix("_sum") for key in keys}


def reader_of(folder: Path) -> LogReader:
    reader = LogReader(folder)
    reader.poll()
    return reader


@pytest.fixture
def throwaway():
    """A metric that a stage of a user's own file logs."""
    metric = Metric(
        "eval/throwaway", "Loss, thrown away", "nats per token", "down", "loss", "Nothing.", "Falls.",
        short="thrown away", row="loss, thrown away", low=0, high=1, checks=("overfitting",), headline=True,
    )  # fmt: skip
    register(metric)
    yield metric
    del METRICS[metric.key]


def test_everything_that_is_logged_is_in_the_table_and_nothing_else_is():
    logged = literals() | BUILT
    assert {key for key in logged if not is_registered(key)} == set()
    assert {key for key in METRICS if not key.endswith("/")} - logged == set()


def test_every_check_that_a_metric_names_exists_and_reads_metrics_that_exist():
    names = {check.name for check in CHECKS}
    judging = {name for metric in METRICS.values() for name in metric.checks}
    assert judging <= names
    assert names - judging == {"constant-rewards", "repeated-text", "recoveries", "not-finite"}  # of texts and events
    assert all(is_registered(key) for check in CHECKS for key in check.beside)


def test_every_row_says_what_it_is():
    for metric in METRICS.values():
        assert metric.label
        assert metric.meaning.endswith(".")
        assert not metric.good or metric.good.endswith((".", "same."))
        assert len(metric.short) <= 16
        assert metric.key.endswith("/") == ("{}" in metric.label)
        assert metric.low is None or metric.high is None or metric.low < metric.high


def test_every_chart_is_drawn_by_some_metric():
    named = {metric.chart for metric in METRICS.values() if metric.chart}
    assert named | SCATTERS.keys() == {name for group in QUESTIONS.values() for name in group}
    assert {key for pair in SCATTERS.values() for key in pair} <= METRICS.keys()


@pytest.mark.parametrize(
    ("key", "label", "short", "unit"),
    [
        ("loss/sft", "Loss, training", "loss", "nats per token"),
        ("gold/a/{}: b", "Gold score: a/{}: b", "gold a/{}: b", "units of the source"),
        ("reward/outputs/reward", "Reward: outputs/reward", "", "units of the source"),
        ("reward/accuracy", "Accuracy, this batch", "accuracy", "share of pairs"),
        ("timing_s/load", "load", "", "seconds"),
        ("gold/", "Gold score: ", "gold ", "units of the source"),
        ("eval/reward/mine", "Reward model: mine", "", "reward units"),
        ("brand/new", "brand/new", "brand/new", ""),
        ("", "", "", ""),
        ("{}", "{}", "{}", ""),
    ],
)
def test_metrics_that_nobody_registered_are_described_too(key, label, short, unit):
    metric = describe(key)
    assert (metric.key, metric.label, metric.short, metric.unit) == (key, label, short, unit)


def test_keys_come_in_the_tables_order_and_unknown_ones_last():
    keys = ["z/z", "lr", "gold/b", "objective/kl", "gold/a", "objective/scores", "a/a"]
    assert in_order(keys) == ["objective/scores", "gold/b", "gold/a", "objective/kl", "lr", "z/z", "a/a"]


def test_a_key_stands_for_one_metric(throwaway):
    register(throwaway)  # as when its file is imported again
    with pytest.raises(ValueError, match="eval/throwaway is a metric already, 'Loss, thrown away'; choose another key"):
        register(Metric("eval/throwaway", "Another"))


def test_charts_have_the_metrics_that_are_there():
    found = charts(["loss", "gold/b", "eval/loss", "gold/a", "objective/kl", "loss/sft", "objective/scores"])
    assert {name: chart.metrics for name, chart in found.items()} == {
        "loss": ("loss/sft", "eval/loss"),
        "score": ("objective/scores",),
        "gold": ("gold/b", "gold/a"),
        "kl": ("objective/kl",),
        "over-optimisation": ("objective/scores", "objective/kl"),
        "loss alone": ("loss",),
    }
    assert [chart.title for chart in found.values()] == [
        "Loss", "Score", "Gold scores", "KL to the reference", "Score against √KL", "loss",
    ]  # fmt: skip
    assert found["loss alone"].question == OTHERS
    assert "over-optimisation" not in charts(["objective/kl"])
    labels = [curve_label(name, found["loss"].title) for name in found["loss"].metrics]
    assert [*labels, curve_label("gold/a", "Gold scores")] == ["training", "held-out", "a"]


def test_a_metric_may_open_a_chart_of_its_own():
    register(Metric("dpo/margin", "Margin", chart="Implicit rewards"))
    register(Metric("dpo/chosen", "Chosen", chart="Implicit rewards"))
    try:
        (chart,) = charts(["dpo/chosen", "dpo/margin"]).values()
        assert chart == (OTHERS, "Implicit rewards", ("dpo/margin", "dpo/chosen"), False)
    finally:
        del METRICS["dpo/margin"], METRICS["dpo/chosen"]


def test_one_line_in_the_table_is_all_that_a_metric_takes(throwaway, tmp_path):
    """It is on the page, in a plot, in the terminal and in the evaluation's table, and its check judges it."""
    rising = {"eval/throwaway": lambda step: step / 60, "loss/sft": lambda step: 1.0}
    reader = reader_of(write_log(tmp_path, stage="user-stage", figures=rising, samples=0))

    table = metric_table([reader])
    assert table["metrics"]["eval/throwaway"]["label"] == "Loss, thrown away"
    assert table["metrics"]["eval/throwaway"]["headline"]
    assert table["charts"][0]["title"] == "Loss"
    assert table["charts"][0]["metrics"] == ("loss/sft", "eval/throwaway")

    (drawing,) = drawings([reader], "loss")
    assert [line.get_label() for line in drawing.figure.axes[0].get_lines()] == ["training", "thrown away"]

    lines = [line.plain for line in dashboard(reader, 80, 40, 1e9)]
    assert any(re.match(r"thrown away +1 ", line) for line in lines)

    figures = {"model": {"eval/throwaway": Figure(0.25, 0.2, 0.3, 9), "eval/loss": Figure(1.5, 1.0, 2.0, 9)}}
    data = DataFile(tmp_path / "data.json", DEMONSTRATIONS, None, "")
    evaluation = Evaluation("sft", {"model": tmp_path}, data, "records", figures, {"cut": 0})
    console = Console(width=100, file=io.StringIO())
    show_report(Report([evaluation], {}, tmp_path), console)
    assert re.search(r"loss, thrown away +│ 0\.250 \[0\.200, 0\.300\]", console.file.getvalue())

    (finding,) = [finding for finding in findings(reader) if finding.check == "overfitting"]
    assert (finding.level, finding.stage) == ("problem", "user-stage")


def test_the_worst_of_several_metrics_that_one_check_judges_counts(tmp_path):
    """A gold score that has just been added hides nothing of one that falls."""
    falling = {"gold/judge": lambda step: -step / 60 + 0.02 * (step % 3), "gold/new": lambda step: None}
    found = findings(reader_of(write_log(tmp_path, figures=falling)))
    assert [finding.level for finding in found if finding.check == "over-optimisation"] == ["problem"]
