"""Tables of an evaluation in the terminal."""

import math
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf.evaluate.estimates import Figure
from rlhf.evaluate.evaluation import Report
from rlhf.evaluate.evaluation_result import Evaluation
from rlhf.metrics import Metric, describe, in_order

_PARTS = {"against": "compared with", "reference": "KL to"}
_ENDS = ("value", "low", "high")
_NARROW = 0.05
"""Width of an interval below which two decimals would not show it."""
_WIDE = 100
"""Number of columns from which three intervals fit beside their values."""


def show_report(report: Report, console: Console) -> None:
    """Print every evaluation, and the parts that were left out."""
    for evaluation in report.evaluations:
        console.print(_heading(evaluation))
        console.print(_SHOWN[evaluation.kind](evaluation, console.width))
        if evaluation.verdict:
            console.print(Text(evaluation.verdict, style="bold"))
        console.print()
    for kind, reason in report.skipped.items():
        console.print(f"{kind} left out: {reason}", markup=False, soft_wrap=True)
    console.print("In brackets: 95% bootstrap intervals; none where all samples agree as far as shown.", markup=False)
    names = [
        name for name in ("evaluation.json", "completions.jsonl", "pairs.jsonl") if (report.folder / name).exists()
    ]
    console.print(f"Written to {report.folder}: {', '.join(names)}", markup=False, soft_wrap=True)


def _heading(evaluation: Evaluation) -> Text:
    facts, n = evaluation.facts, next(iter(next(iter(evaluation.figures.values())).values())).n
    what = {"sft": "Language model", "reward": "Reward model"}.get(evaluation.kind, "")
    what = what or f"Policy, {facts['decoding']} at temperature {facts['temperature']:g}"
    what = what.replace(f"greedy at temperature {facts.get('temperature', 1):g}", "greedy")
    source = f"{evaluation.data.path}" + (f" ({evaluation.data.origin})" if evaluation.data.origin else "")
    per = facts.get("samples_per_prompt", 1)
    times = f", {per} completions each" if per > 1 else ""
    lines = [Text(what, style="bold"), Text(f"{n} {evaluation.unit} of {source}{times}")]
    if facts["cut"]:
        lines.append(Text(f"{facts['cut']} of them cut to fit the context", style="bold"))
    if facts.get("dropped"):
        lines.append(Text(f"without {facts['dropped']} pairs whose chosen text equals the rejected one"))
    if facts.get("equal"):
        text = f"without {facts['equal']} pairs whose chosen text equals the rejected one after the cut"
        lines.append(Text(text, style="bold"))
    if "bag_of_words" in facts:
        lines.append(Text(f"bag of words learnt by {facts['bag_of_words']}"))
    parts: dict[str, list[str]] = {}
    for part, folder in evaluation.models.items():
        parts.setdefault(str(folder), []).append(_PARTS.get(part, part))
    lines += [Text(f"{' and '.join(played)}: {folder}") for folder, played in parts.items()]
    return Text("\n").join(lines)


def _sft(evaluation: Evaluation, width: int) -> RenderableType:
    return _figures(evaluation, ["model"], width)


def _policy(evaluation: Evaluation, width: int) -> RenderableType:
    parts: list[str] = [part for part in ("policy", "against", "difference") if part in evaluation.figures]
    tables: list[RenderableType] = [_figures(evaluation, parts, width)]
    if "wins" in evaluation.figures:
        tables.append(_wins(evaluation))
    return Group(*tables)


def _reward(evaluation: Evaluation, width: int) -> RenderableType:
    curve, lengths = (
        Table(title="Reliability: confidence and accuracy"),
        Table(title="Accuracy by length difference"),
    )
    for heading in ("sigmoid(|margin|)", "mean", "accuracy", "pairs"):
        curve.add_column(heading, justify="right")
    for row in evaluation.facts["reliability"]:
        span = f"{row['from']:.2f} to {row['to']:.2f}"
        curve.add_row(span, f"{row['confidence']:.2f}", f"{row['accuracy']:.2f}", str(row["n"]))
    chance = evaluation.facts["calibration_error_by_chance"]
    curve.caption = f"With this many pairs, a calibrated model has an expected calibration error of {chance:.3f}."
    for heading in ("chosen longer by, tokens", "accuracy", "pairs"):
        lengths.add_column(heading, justify="right")
    for row in evaluation.facts["accuracy_by_length_difference"]:
        value, low, high = (math.nan if row["accuracy"][end] is None else row["accuracy"][end] for end in _ENDS)
        figure = Figure(value, low, high, row["accuracy"]["n"])
        span = f"{row['from']:+d} to {row['to']:+d}" if row["from"] != row["to"] else f"{row['from']:+d}"
        lengths.add_row(span, _cell(figure, ".2f"), str(figure.n))
    return Group(_figures(evaluation, ["model"], width), curve, lengths)


_SHOWN: dict[str, Callable[[Evaluation, int], RenderableType]] = {"sft": _sft, "reward": _reward, "policy": _policy}


def _figures(evaluation: Evaluation, columns: list[str], width: int) -> Table:
    table, between = Table(), "\n" if len(columns) > 2 and width < _WIDE else " "
    table.add_column("figure")
    for column in columns:
        heading = {"model": "value", "against": evaluation.against}.get(column, column)
        table.add_column(heading, justify="right", no_wrap=True)
    for name in in_order(evaluation.figures[columns[0]]):
        metric, cells = describe(name), []
        for column in columns:
            figure = evaluation.figures[column].get(name)
            sign = "+" if column == "difference" or metric.signed else ""
            cells.append("" if figure is None else _cell(figure, sign + _precision(metric, figure), between))
        table.add_row(Text(metric.row or metric.label), *cells)
    return table


def _wins(evaluation: Evaluation) -> Table:
    table = Table()
    table.add_column(f"policy against {evaluation.against}, by")
    for heading in ("win rate", "wins", "ties", "losses"):
        table.add_column(heading, justify="right")
    figures = evaluation.figures["wins"]
    for name in [name.removeprefix("eval/win_rate/") for name in figures if name.startswith("eval/win_rate/")]:
        shares = [figures[f"eval/{share}/{name}"] for share in ("wins", "ties", "losses")]
        cells = [_cell(figures[f"eval/win_rate/{name}"], ".3f"), *(f"{share.value:.3f}" for share in shares)]
        table.add_row(Text(name), *cells)
    for name in [name for name in figures if name.startswith("eval/first_place/")]:
        judge = name.removeprefix("eval/first_place/")
        table.caption = f"{table.caption or ''}{judge} was asked in both orders; it favoured the first place with " + (
            f"{figures[name].value:.3f} (0.5 is fair). "
        )
    return table


def _precision(metric: Metric, figure: Figure) -> str:
    if metric.low is not None and metric.high is not None:
        return ".3f"
    return ".1f" if abs(figure.value) >= 100 else ".3f" if figure.high - figure.low < _NARROW else ".2f"


def _cell(figure: Figure, form: str, between: str = " ") -> str:
    """Return `value [low, high]`."""
    if math.isnan(figure.value):
        return "undefined"
    value, low, high = (_number(number, form) for number in figure[:3])
    if math.isnan(figure.low) or math.isnan(figure.high) or low == high:
        return value
    return f"{value}{between}\\[{low}, {high}]"


def _number(value: float, form: str) -> str:
    """Return a formatted number, without a sign if it is rounded to 0."""
    text = format(value, form)
    return text.lstrip("+-") if float(text) == 0 else text
