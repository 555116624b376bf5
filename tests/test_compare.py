"""Runs are grouped by settings and never averaged across them; seeds of one setting make an interval."""

import json
import math

import numpy as np
import pytest
from rlhf.cli import monitor
from scipy import stats
from synthetic_logs import write_log

from rlhf.metrics import describe
from rlhf.monitor.compare import (
    FinalFigure,
    comparison,
    group_finals,
    group_runs,
    mean_with_interval,
    run_finals,
)
from rlhf.monitor.log import read_logs
from rlhf.monitor.plot_axes import draw_chart, mean_of_runs, new_figure, window_of
from rlhf.monitor.plots import write_plots
from rlhf.monitor.run_facts import described, evaluation_of, settings_of_run, verdicts_of
from rlhf.monitor.view import metric_table, run_state


def add_setup(logs, settings, digests=None, units=None):
    """Put settings into a log's start event, as a run of today does."""
    path = logs / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    setup = {"settings": settings, "provenance": {"digests": digests or {}}, "units": units or {}}
    path.write_text("\n".join([json.dumps(json.loads(first) | setup), *rest]) + "\n")
    return logs


def shelf(tmp_path, rates=(1e-4, 6e-4), seeds=3, **settings):
    return [
        add_setup(
            write_log(tmp_path / f"{rate}-{seed}", seed=seed, samples=1, count=40),
            {"seed": seed, "ppo.learning_rate": rate, "ppo.kl_coef": 0.05} | settings,
        )
        for rate in rates
        for seed in range(seeds)
    ]


def test_the_settings_in_which_runs_differ_make_the_groups(tmp_path):
    groups = group_runs(read_logs(shelf(tmp_path)))
    assert [group.name for group in groups] == ["ppo.learning_rate 0.0001", "ppo.learning_rate 0.0006"]
    assert [group.members for group in groups] == [(0, 1, 2), (3, 4, 5)]
    (alike,) = group_runs(read_logs(shelf(tmp_path / "alike", rates=(1e-4,))))
    assert alike.name == ""
    assert alike.members == (0, 1, 2)


def test_other_data_and_other_rewards_are_other_settings_but_models_of_other_seeds_are_not(tmp_path):
    def run(name, digests):
        return add_setup(write_log(tmp_path / name, samples=1), {"seed": 1}, digests)

    source = {"function": None, "weight": 1.0, "model": "aa"}
    logs = [
        run("a", {"data": "11111111aa", "model": "x", "sources": [source]}),
        run("b", {"data": "11111111aa", "model": "y", "sources": [source | {"model": "bb"}]}),
        run("c", {"data": "22222222aa", "model": "x", "sources": [source]}),
        run("d", {"data": "11111111aa", "model": "x", "sources": [source, {"function": "f", "weight": 0.5}]}),
    ]
    groups = group_runs(read_logs(logs))
    assert [group.members for group in groups] == [(0, 1), (2,), (3,)]
    assert "ppo data 22222222" in groups[1].name
    assert "0.5*f" in groups[2].name
    assert "seed" not in settings_of_run(read_logs(logs)[0])


def test_an_interval_is_students(tmp_path):
    values = [1.0, 2.0, 4.0]
    figure = mean_with_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert figure == pytest.approx((np.mean(values), low, high))
    assert mean_with_interval([3.0])[0] == 3.0
    assert math.isnan(mean_with_interval([3.0]).low)
    centre, half = mean_of_runs(np.array([[1.0, 5.0], [2.0, np.nan], [4.0, np.nan]]))
    np.testing.assert_allclose(centre, [np.mean(values), 5.0])
    np.testing.assert_allclose(half, [high - np.mean(values), 0.0])


def test_an_interval_keeps_to_the_bounds_of_its_metric(tmp_path):
    share, score = "response_length/ended", "objective/scores"
    runs = [{name: FinalFigure(value) for name in (share, score)} for value in (0.1, 0.9)]
    means = group_finals(runs)
    assert means[share] == (0.5, 0.0, 1.0)
    assert means[score] == mean_with_interval([0.1, 0.9])
    assert group_finals([{"objective/kl": FinalFigure(value)} for value in (-3.0, -1.0)])["objective/kl"].low < -2
    assert math.isnan(group_finals(runs[:1])[share].low)


def test_a_plot_has_a_line_for_each_group_and_no_mean_over_both(tmp_path):
    readers = read_logs(shelf(tmp_path))
    with np.errstate(all="raise"):
        _, (axes,) = new_figure(1, title="")
        draw_chart(axes, readers, "ppo", next(c for c in charts_of(readers) if "objective/kl" in c.metrics))
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["ppo.learning_rate 0.0001 (3 runs)", "ppo.learning_rate 0.0006 (3 runs)"]
    first = np.mean([reader.series("ppo", "objective/kl").values for reader in readers[:3]], axis=0)
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), first)


def charts_of(readers):
    from rlhf.monitor.charts import charts

    return charts(readers[0].names("ppo")).values()


def test_the_window_of_a_running_mean_is_named():
    assert window_of(79) == 1
    assert window_of(80) == 3
    assert window_of(400) == 11


@pytest.mark.parametrize(("file_format", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_plots_have_the_format_that_is_asked_for(tmp_path, file_format, magic):
    (logs,) = shelf(tmp_path, rates=(1e-4,), seeds=1)
    (path,) = write_plots([logs], "lengths", file_format=file_format, titles=False)
    assert path.suffix == f".{file_format}"
    assert path.read_bytes().startswith(magic)


def test_final_figures_and_groups_are_values_for_the_page(tmp_path):
    readers = read_logs(shelf(tmp_path))
    finals = run_finals(readers[0])
    assert finals["objective/kl"].value == pytest.approx(readers[0].series("ppo", "objective/kl").values[-5:].mean())
    assert list(finals) == [
        "objective/scores",
        "gold/judge",
        "objective/kl",
        "response_length/mean",
        "response_length/ended",
    ]
    value = comparison(readers)
    json.dumps(value, allow_nan=False)
    assert value["groups"][0]["runs"] == [0, 1, 2]
    mean, low, high = value["groups"][0]["figures"]["objective/kl"]
    assert low < mean < high
    assert value["runs"][0]["objective/kl"][1:] == [None, None]
    assert value["quantiles"][1] == pytest.approx(stats.t.ppf(0.975, 2))


def test_the_terminal_shows_groups_and_finals(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    logs = [str(path) for path in shelf(tmp_path)]
    assert monitor.main(["--log-dir", *logs]) == 0
    out = capsys.readouterr().out
    assert "1: ppo.learning_rate 0.0001 (3 runs)" in out
    assert "group 2: mean of 3 runs" in out
    assert "at least five lines" in out
    assert out.count("[") >= 2


def test_scores_are_called_standard_deviations_where_the_run_says_so(tmp_path):
    logs = write_log(tmp_path / "a", samples=1)
    readers = read_logs([add_setup(logs, {}, units={"objective/scores": "standard deviations per completion"})])
    assert described(readers, "objective/scores").unit == "standard deviations per completion"
    assert metric_table(readers)["metrics"]["objective/scores"]["unit"] == "standard deviations per completion"
    mixed = read_logs([logs, write_log(tmp_path / "b", samples=1)])
    assert described(mixed, "objective/scores") == describe("objective/scores")


def test_verdicts_and_evaluations_are_shown_and_setups_are_not_events(tmp_path):
    verdict = {"event": "verdict", "text": "It can be optimised.", "sound": True}
    logs = add_setup(write_log(tmp_path, samples=1, events=(verdict,)), {"ppo.kl_coef": 1})
    (reader,) = read_logs([logs])
    assert verdicts_of(reader) == {"ppo": {"text": "It can be optimised.", "sound": True}}
    assert reader.progress("ppo").state == "ended", "a verdict comes after the end"
    state = run_state(reader, "x")
    assert state["setup"]["ppo"]["settings"] == {"ppo.kl_coef": 1}
    assert all("settings" not in event for event in state["events"])
    assert state["evaluation"] == {}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "evaluation.json").write_text('{"evaluations": [], "format": 1}')
    assert evaluation_of(reader)["format"] == 1
