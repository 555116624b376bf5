"""Logs of runs that never were: healthy ones with noise, and any figure of them replaced."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Callable[[int], float | None]]
"""Metric by name, as a function of the step (1..)."""


def healthy(count: int, seed: int = 0) -> Figures:
    """Metrics of a good PPO run of `count` iterations, with noise."""
    rng = random.Random(seed)

    def noisy(value: Callable[[float], float], spread: float) -> Callable[[int], float]:
        return lambda step: value(step / count) + spread * rng.gauss(0, 1)

    return {
        "objective/kl": noisy(lambda t: 6 * (1 - math.exp(-4 * t)), 0.4),
        "objective/scores": noisy(lambda t: 2 * (1 - math.exp(-5 * t)), 0.15),
        "objective/rlhf_reward": noisy(lambda t: 2 * (1 - math.exp(-5 * t)) - 0.6 * t, 0.2),
        "gold/judge": noisy(lambda t: 1.5 * (1 - math.exp(-4 * t)), 0.15),
        "val/explained_variance": noisy(lambda t: 0.6 * (1 - math.exp(-6 * t)), 0.1),
        "val/ratio_first": noisy(lambda t: 1.0, 1e-6),
        "loss/value_avg": lambda step: 0.5 * math.exp(-3 * step / count) * math.exp(0.3 * rng.gauss(0, 1)),
        "response_length/mean": noisy(lambda t: 20 + 4 * t, 0.8),
        "response_length/ended": lambda step: min(1.0, 0.97 + 0.02 * rng.gauss(0, 1)),
        "policy/clipfrac_avg": lambda step: abs(0.05 + 0.03 * rng.gauss(0, 1)),
        "policy/approxkl_avg": lambda step: 0.01 * math.exp(0.7 * rng.gauss(0, 1)),
        "policy/entropy_avg": noisy(lambda t: 1.2 - 0.5 * t, 0.05),
        "policy/updates": lambda step: 8,
        "timing_s/generate": lambda step: 0.3 * math.exp(0.1 * rng.gauss(0, 1)),
        "timing_s/score": lambda step: 0.1 * math.exp(0.1 * rng.gauss(0, 1)),
        "timing_s/update": lambda step: 0.5 * math.exp(0.1 * rng.gauss(0, 1)),
        "perf/tokens_per_s": lambda step: (500 if step == 1 else 2000) * math.exp(0.15 * rng.gauss(0, 1)),
        "timing_s/step": lambda step: 1.1 + abs(0.1 * rng.gauss(0, 1)),
    }


def completion(step: int, row: int) -> dict[str, Any]:
    """A sample that nothing is wrong with."""
    rng = random.Random(1000 * step + row)
    words = re.findall(
        r"\w+", "we are happy to send you a new one today please keep the old parts and write again soon"
    )
    rng.shuffle(words)
    return {
        "prompt": f"Customer: my item {row} broke.\nAgent:",
        "completion": " " + " ".join(words),
        "score": rng.gauss(step / 50, 1),
        "kl": rng.gauss(5, 1),
        "tokens": len(words),
        "ended": True,
        "policy_version": 8 * step,
    }


def write_log(
    folder: Path,
    *,
    count: int = 60,
    seed: int = 0,
    stage: str = "ppo",
    figures: Figures | None = None,
    samples: int = 8,
    sample: Callable[[int, int], dict[str, Any]] = completion,
    events: tuple[dict[str, Any], ...] = (),
    end: bool = True,
) -> Path:
    """Write logs/ below `folder`; `figures` replace those of a healthy PPO run, or are all of another stage."""
    chosen = (healthy(count, seed) if stage == "ppo" else {}) | (figures or {})
    start = {"event": "start", "time": 1e9, "format": 1, "step": 0, "total": count, "unit": "iteration", "notes": []}
    lines: list[dict[str, Any]] = [
        {"step": step, "time": 1e9 + 1.2 * step} | {name: value(step) for name, value in chosen.items()}
        for step in range(1, count + 1)
    ]
    lines = [start, *lines, *events]
    if end:
        lines.append({"event": "end", "time": 1e9 + 1.2 * count, "step": count})
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    append(logs / "metrics.jsonl", stage, lines)
    texts = [{"step": step} | sample(step, row) for step in range(1, count + 1) for row in range(samples)]
    append(logs / "samples.jsonl", stage, texts)
    return logs


def append(path: Path, stage: str, lines: list[dict[str, Any]]) -> None:
    """Add lines as a run would."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        for line in lines:
            stream.write(json.dumps({"stage": stage} | line, ensure_ascii=False) + "\n")
