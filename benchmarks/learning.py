"""python -m benchmarks learning: what our PPO, RLOO and DPO learn beside TRL's, from the same models, seed by seed.

Both sides start from the same SFT model, with the same reward, prompts and settings, in rounds of one step that
alternate. The policies of both, at points on the way, are measured by the same code: reward and exact KL on prompts
that no run has seen. Runs that are there already are not made again.
"""

import functools
import json
import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import learners
from benchmarks.peers.environment import TRL_WITH_PPO, python_of
from benchmarks.sides import Setting, Side
from benchmarks.timing import console, interleave, machine, show, summary
from rlhf.monitor.compare import mean_with_interval
from rlhf.monitor.plot_axes import COLOURS, plot_style

_SHARED = {"steps": 32, "adam_eps": 1e-8, "max_new_tokens": 32, "kl_coef": 0.05, "clip_eps": 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": _SHARED
    | {
        "prompts_per_step": 32,
        "samples_per_prompt": 1,
        "epochs": 2,
        "minibatch": 16,
        "learning_rate": 3e-4,
        "lam": 0.95,
        "value_coef": 0.1,
    },
    "rloo": _SHARED
    | {"prompts_per_step": 16, "samples_per_prompt": 4, "epochs": 1, "minibatch": 64, "learning_rate": 1e-3},
    "dpo": {
        "steps": 60,
        "pairs_per_step": 32,
        "beta": 0.1,
        "learning_rate": 2e-4,
        "adam_eps": 1e-8,
        "max_grad_norm": 1.0,
        "max_new_tokens": 32,
    },
}
"""What both sides are told, by method."""
PEERS = {"ppo": "TRL 1.12", "rloo": "TRL 1.16", "dpo": "TRL 1.16"}
POINTS = 4
"""Policies of a run that are measured, evenly over its steps."""
_SAMPLES, _PAIR_SAMPLES = 2, 6
"""Completions of a prompt: of a measure, and of which the pairs are made."""


def run(output: Path, peers: Path, *, methods: Sequence[str], seeds: int) -> list[Path]:
    """Make the runs of these methods, print a table and write JSON and a plot for each; return the JSON files."""
    return [_compare(output, peers, method, seeds) for method in methods]


def _compare(output: Path, peers: Path, method: str, seeds: int) -> Path:
    runs = []
    for seed in range(seeds):
        folder = output / "learning" / f"seed-{seed}"
        runs.append(_run(folder, peers, method, seed))
        console.print(f"{method} seed {seed}: {_line(runs[-1])}", highlight=False)
    rows = figures(runs)
    show(f"learning-{method}, {seeds} seeds", [{name: _cell(cell) for name, cell in row.items()} for row in rows])
    content = {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"threads": "1"},
        "method": method,
        "peer": PEERS[method],
        "settings": SETTINGS[method],
        "rows": rows,
        "gold at equal KL": _interval([gold_at_equal_kl(run) for run in runs]),
        "speed": speed(runs),
        "runs": [
            {name: part for name, part in run.items() if name in ("seed", "start", "steps", "points")} for run in runs
        ],
    }
    path = output / f"learning-{method}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, output / f"learning-{method}.svg")
    return path


def _run(folder: Path, peers: Path, method: str, seed: int) -> dict[str, Any]:
    """Train both sides from one SFT model, round by round in turn, and measure their points."""
    result, settings = folder / f"{method}.json", SETTINGS[method]
    if result.is_file() and (found := json.loads(result.read_text()))["settings"] == settings:
        return found
    files = learners.make_sft(folder, seed)
    length = settings["max_new_tokens"]
    data = {side: {"prompts": str(files.prompts)} for side in ("ours", "peer")}
    if method == "dpo":
        pairs = learners.make_pairs(folder, files.prompts, samples=_PAIR_SAMPLES, max_new_tokens=length, seed=seed)
        ordered = learners.in_our_order(pairs, seed=seed, count=settings["steps"] * settings["pairs_per_step"])
        data = {"ours": {"pairs": str(pairs)}, "peer": {"pairs": str(ordered)}}
    common = {"model": str(folder / "sft"), "seed": seed, "points": POINTS, "device": "cpu", "threads": 1}
    shutil.rmtree(folder / method, ignore_errors=True)
    with ExitStack() as stack:
        sides = {}
        for side in ("ours", "peer"):
            target = folder / method / side
            setting = _setting(side, method, peers, common | settings | data[side] | {"output": str(target)})
            sides[side] = stack.enter_context(Side(setting, folder / method / f"{side}.log"))
        seconds = interleave({name: side.round for name, side in sides.items()}, settings["steps"], warmup=0)
    measure = functools.partial(
        learners.measure,
        reference=folder / "sft",
        prompts=files.heldout_prompts,
        samples=_SAMPLES,
        max_new_tokens=length,
    )
    every = settings["steps"] // POINTS
    steps = range(every, every * POINTS + 1, every)
    points = {side: [measure(folder / method / side / f"point-{step}") for step in steps] for side in sides}
    start = measure(folder / "sft")
    if "kl_coef" in settings:
        for point in (start, *points["ours"], *points["peer"]):
            point["objective"] = point["gold"] - settings["kl_coef"] * point["kl"]
    facts = {"seed": seed, "settings": settings, "start": start, "steps": list(steps)}
    found = facts | {"points": points, "seconds": seconds}
    result.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _setting(side: str, method: str, peers: Path, settings: dict[str, Any]) -> Setting:
    if side == "ours":
        function = "dpo" if method == "dpo" else "ppo"
        return Setting(method, f"benchmarks.learners:{function}", settings | {"method": method})
    path = str(peers / TRL_WITH_PPO) if method == "ppo" else ""
    return Setting(method, f"benchmarks.peers.trl_learning:{method}", settings, python_of(peers), path)


def figures(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and 95% interval by Student's t over the seeds, of the start, both sides and their differences."""
    last = {side: [run["points"][side][-1] for run in runs] for side in ("ours", "peer")}
    pairs = list(zip(last["ours"], last["peer"], strict=True))
    columns = {"start": [run["start"] for run in runs], **last}
    columns["difference"] = [{name: a[name] - b[name] for name in a} for a, b in pairs]
    return [
        {"policy": column} | {name: _interval([point[name] for point in points]) for name in points[0]}
        for column, points in columns.items()
    ]


def gold_at_equal_kl(run: dict[str, Any]) -> float:
    """Return our gold score minus the peer's where both curves have the smaller of the two last KLs."""
    curves = {side: [run["start"], *points] for side, points in run["points"].items()}
    kl = min(points[-1]["kl"] for points in curves.values())
    gold = {}
    for side, points in curves.items():
        ordered = sorted(points, key=lambda point: point["kl"])
        gold[side] = np.interp(kl, [point["kl"] for point in ordered], [point["gold"] for point in ordered])
    return float(gold["ours"] - gold["peer"])


def speed(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median seconds of a step of both sides, and the median of the peer's over ours, step by step."""
    seconds = {side: [s for run in runs for s in run["seconds"][side][1:]] for side in ("ours", "peer")}
    ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {"ratio": statistics.median(ratios)} | {side: summary(times) for side, times in seconds.items()}


def _interval(values: Sequence[float]) -> list[float]:
    mean, low, high = mean_with_interval(values)
    return [mean, low, high]


def _cell(cell: str | list[float]) -> str:
    return cell if isinstance(cell, str) else f"{cell[0]:.3f} [{cell[1]:.3f} to {cell[2]:.3f}]"


def _line(run: dict[str, Any]) -> str:
    ends = {"start": run["start"], "ours": run["points"]["ours"][-1], "peer": run["points"]["peer"][-1]}
    parts = [f"{name} {end['gold']:.3f} at {end['kl']:.2f} nats" for name, end in ends.items()]
    times = ", ".join(f"{statistics.median(run['seconds'][side]):.3f}" for side in ("ours", "peer"))
    return f"{'; '.join(parts)}; {times} s a step"


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw gold score against KL at the points of both sides: means over seeds with their intervals."""
    runs = content["runs"]
    with plot_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for colour, (side, label) in zip(COLOURS, {"peer": content["peer"], "ours": "rlhf"}.items(), strict=False):
            at = [[run["start"] for run in runs]]
            at += [[run["points"][side][place] for run in runs] for place in range(len(runs[0]["steps"]))]
            kl, gold = ([_interval([point[name] for point in points]) for points in at] for name in ("kl", "gold"))
            axes.errorbar(
                [mean for mean, *_ in kl],
                [mean for mean, *_ in gold],
                xerr=[[mean - low for mean, low, _ in kl], [high - mean for mean, _, high in kl]],
                yerr=[[mean - low for mean, low, _ in gold], [high - mean for mean, _, high in gold]],
                color=colour, label=label, marker="o", markersize=4, linewidth=1.2, capsize=2,
            )  # fmt: skip
        axes.set_xlabel("KL to the SFT model, nats per completion")
        axes.set_ylabel("gold score")
        axes.set_title(f"{content['method'].upper()}: {len(runs)} seeds, 95% intervals", loc="left", fontsize=10)
        axes.legend(loc="lower right")
        figure.savefig(path)
