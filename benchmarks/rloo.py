"""RLOO iterations against TRL's RLOOTrainer, and against our own PPO on as many completions."""

from pathlib import Path
from typing import Any

from benchmarks import material, ours, ppo
from benchmarks.bench import Bench
from benchmarks.compare import Work, compare_all

_TARGETS = {("small", "fp32"): 1.8, ("small", "best"): 3.0, ("tiny", "fp32"): 0.0}
_SAMPLES = 4
"""Completions of a prompt."""
_TIME_TARGET = 1.67
"""At most 0.6 of the time of PPO with a separate critic."""
MEMORY_TARGET = 0.7
"""Of that PPO's memory."""


def run(bench: Bench) -> list[Path]:
    """Measure every row."""
    return compare_all("rloo", works(bench), bench)


def works(bench: Bench) -> list[Work]:
    """TRL's iteration in fp32 and at best, then our PPO's without its critic."""
    against_trl = [_against_trl(bench, kind) for size, kind in _TARGETS if size == bench.size]
    return [*against_trl, without_critic(bench, _TIME_TARGET)]


def _against_trl(bench: Bench, kind: str) -> Work:
    """One update on all completions, as RLOO has it; the reward is a function, which is called in no time."""
    size = material.SIZES[bench.size]
    completions = size.ppo.completions
    iteration = size.ppo._replace(prompts=completions // _SAMPLES, samples=_SAMPLES, epochs=1, minibatch=completions)
    files = ppo.files(bench)
    settings: dict[str, Any] = {name: files[name] for name in ("model", "prompts_file")} | {"iteration": iteration}
    mine: dict[str, Any] = {"reward": "benchmarks.material:kindness", "critic": "none"}
    return Work(
        f"{ppo.rolled_out('RLOO', bench, iteration)}, an update, {kind}",
        "TRL RLOOTrainer",
        bench.ours("ppo", ours.COMPILED_FP32 if kind == "fp32" else ours.COMPILED_BEST, **settings, **mine),
        bench.theirs("trl_trainers:rloo", ppo.FP32 if kind == "fp32" else ppo.BEST, **settings),
        _TARGETS[bench.size, kind],
        lambda number: ppo.least(size.shape, iteration, number, (True,), (True,)),
        exact=kind == "fp32",
    )


def without_critic(bench: Bench, target: float) -> Work:
    """Our RLOO in the place of the peer's, our PPO with a separate critic in that of TRL: as many completions, updates.

    Args:
        bench: the run.
        target: the ratio to reach.
    """
    size = material.SIZES[bench.size]
    iteration = size.ppo._replace(prompts=size.ppo.completions // _SAMPLES, samples=_SAMPLES)
    files = ppo.files(bench)
    return Work(
        f"{ppo.described('RLOO', bench, iteration)}, fp32",
        "our PPO, separate critic",
        bench.ours("ppo", ours.COMPILED_FP32, critic="none", iteration=iteration, **files),
        bench.ours("ppo", ours.COMPILED_FP32, critic="separate", **files),
        target,
        lambda number: ppo.least(size.shape, iteration, number, *ppo.PASSES["shared"]),
    )
