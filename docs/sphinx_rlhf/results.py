"""Tables of the results in docs/results, which the commands named in each file wrote."""

import json
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from .source import ROOT


def setup(app: Sphinx) -> None:
    """Register the directives."""
    app.add_directive("demo-result", _DemoResult)
    app.add_directive("demo-figures", _DemoFigures)
    app.add_directive("real-data", _RealData)
    app.add_directive("learning-result", _LearningResult)


def _read(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def _demo() -> Any:
    return _read("demo")


def verdict(demo: Any) -> str:
    """Return the demo's verdict as a table."""
    before, after, kl = (demo["comparison"][name] for name in ("before", "after", "kl"))
    return "\n".join(
        (
            "| model | mean gold score, 95% interval | KL to SFT |",
            "|---|---|---|",
            f"| SFT | {before['mean']:+.2f} ± {before['interval']:.2f} | 0 |",
            f"| PPO | {after['mean']:+.2f} ± {after['interval']:.2f} | {kl:.1f} nats per completion |",
            f"| gain | {demo['comparison']['gain']:+.2f} ± {demo['comparison']['gain_interval']:.2f} | |",
        )
    )


def _origin(demo: Any, command: str) -> str:
    return f"`{command}`, seed {demo['seed']}, {demo['date']}, {demo['machine']}."


class _DemoResult(SphinxDirective):
    """The verdict of the demo's judge."""

    def run(self) -> list[nodes.Node]:
        demo = _demo()
        return self.parse_text_to_nodes(f"{verdict(demo)}\n\n{_origin(demo, demo['commands'][0])}")


class _DemoFigures(SphinxDirective):
    """```{demo-figures} sft```: what `rlhf-evaluate` found of the demo's model, with 95% intervals."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        demo = _demo()
        evaluation = next(e for e in demo["evaluations"] if e["eval_type"] == self.arguments[0])
        groups = {name: group for name, group in evaluation["figures"].items() if name != "difference"}
        columns = [name for name in groups if name != "wins"]
        rows = [f"| metric | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for key in dict.fromkeys(key for name in columns for key in groups[name]):
            cells = (_cell(groups[name].get(key)) for name in columns)
            rows.append(f"| `{key}` | {' | '.join(cells)} |")
        text = f"{_origin(demo, demo['commands'][1])} In brackets: 95% bootstrap intervals over {evaluation['unit']}."
        return self.parse_text_to_nodes("\n".join(rows) + "\n\n" + text)


class _RealData(SphinxDirective):
    """```{real-data} real_data```: runs on real data with their finals, and a judge's mean scores before and after."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        results = _read(self.arguments[0])
        columns = ["data, seed", "score, std", "KL, nats", "tokens", "ended", "judge, before", "judge, after"]
        columns += ["gain"] if "judge_gain" in results["runs"][0] else []
        rows = [f"| {' | '.join([*columns, 'problems'])} |", "|---" * (len(columns) + 1) + "|"]
        for run in results["runs"]:
            final = run["finals"]
            judge = [f"{mean:+.2f} ± {half:.2f}" for mean, half in run["judge"]] if "judge" in run else ["", ""]
            cells = [
                f"{run['task']}, {run['seed']}",
                f"{final['objective/scores']:+.2f}",
                f"{final['objective/kl']:.1f}",
                f"{final['response_length/mean']:.0f}",
                f"{final['response_length/ended']:.0%}",
                *judge,
            ]
            if "judge_gain" in run:
                cells.append("{:+.2f} \\[{:.2f}, {:.2f}\\]".format(*run["judge_gain"]))
            rows.append(f"| {' | '.join([*cells, '; '.join(run['problems']) or 'none'])} |")
        origin = f"`{results['command']}`, {results['date']}, {results['machine']}."
        return self.parse_text_to_nodes("\n".join(rows) + "\n\n" + origin)


def _cell(figure: dict[str, float] | None) -> str:
    if figure is None:
        return ""
    digits = 2 if abs(figure["value"]) >= 1 else 3
    value, low, high = (f"{round(figure[name], digits) + 0.0:.{digits}f}" for name in ("value", "low", "high"))
    return value if low == high else f"{value} \\[{low}, {high}\\]"


class _LearningResult(SphinxDirective):
    """```{learning-result} rloo```: what `python -m benchmarks learning` found of a method on both sides."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = ROOT / "docs" / "results" / f"learning-{self.arguments[0]}.json"
        return self.parse_text_to_nodes(learning(json.loads(path.read_text())))


def learning(result: Any) -> str:
    """Return the result of `python -m benchmarks learning` for one method as a table and a paragraph."""
    peer, settings, seeds = result["peer"], result["settings"], len(result["runs"])
    names = {"start": "SFT", "peer": peer, "ours": "rlhf", "difference": f"rlhf minus {peer}"}
    columns = {"gold": "gold score", "kl": "KL to SFT, nats per completion", "tokens": "tokens"}
    if "kl_coef" in settings:
        columns["objective"] = f"gold score minus {settings['kl_coef']} KL"
    rows = {row["policy"]: row for row in result["rows"]}
    lines = [f"| policy | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for policy, name in names.items():
        cells = (_cell(dict(zip(("value", "low", "high"), rows[policy][column], strict=True))) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    equal = _cell(dict(zip(("value", "low", "high"), result["gold at equal KL"], strict=True)))
    speed, machine = result["speed"], result["machine"]
    text = (
        f"Where both curves have the same KL, our gold score minus TRL's is {equal}. A step took "
        f"{speed['ours']['median']:.2f} s here and {speed['peer']['median']:.2f} s with TRL; the median of TRL's time "
        f"over ours is {speed['ratio']:.1f}, in steps that alternated, beside other work. "
        f"`python -m benchmarks learning --method {result['method']} --seeds {seeds}`, {result['taken'][:10]}, "
        f"{machine['cpu']}, one thread, torch {machine['torch']}, fp32, not compiled. In brackets: 95% intervals over "
        f"{seeds} seeds, by Student's t; of differences seed by seed."
    )
    return "\n".join(lines) + "\n\n" + text
