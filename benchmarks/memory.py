"""The most memory that the process of a PPO run ever holds, against TRL's; and ours where it has to fit.

Rows are in MB, so a ratio below its target is good, unlike in the other tables.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import material, ours, ppo, rloo
from benchmarks.bench import Bench
from benchmarks.compare import Work, check_alike
from benchmarks.sides import Setting, Side
from benchmarks.timing import console, report

_TARGET = 0.5
_ITERATIONS = 2
"""Each side's memory grows no more after the second."""
_LIMITS = {"gpt2": 6e9, "tiny": 6e9}
"""Bytes within which our iteration has to stay on a CPU, by size."""
_MICRO_BATCH, _ROLLOUT_BATCH = 4, 16
"""Completions that we score or update on at once there, and generate at once: what a user short of memory would set."""


def run(bench: Bench) -> list[Path]:
    """Measure every row; each process has the machine's memory to itself, so they run one after the other."""
    fitting = [critic for critic in ppo.CRITICS if bench.size in _LIMITS and bench.device == "cpu"]
    measured = [_fit(bench, critic) for critic in fitting]
    works = [ppo.work(bench, critic, "fp32", _TARGET) for critic in ppo.CRITICS]
    for work in (*works, rloo.without_critic(bench, rloo.MEMORY_TARGET)):
        measured += [_against(bench, work, setting) for setting in work.ours]
    rows = [row for row in measured if row]
    return [report(f"memory-{bench.size}-{bench.device}", rows, bench.output)] if rows else []


def _fit(bench: Bench, critic: str) -> dict[str, Any]:
    """Ours against a limit, in micro-batches small enough for it."""
    prompts, _, minibatch, *_ = material.SIZES[bench.size].ppo
    micro, rollout = min(_MICRO_BATCH, minibatch), min(_ROLLOUT_BATCH, prompts)
    rolled_out = ppo.rolled_out("PPO", bench, material.SIZES[bench.size].ppo)
    what = f"{rolled_out}, {critic} critic, fp32, micro-batches of {micro}, {rollout} generated at once"
    if bench.only not in what:
        return {}
    chosen = {"critic": critic, "micro_batch": micro, "rollout_batch": rollout}
    plain = tuple(setting for setting in ours.COMPILED_FP32 if setting["compile"] == "off")  # compiled code holds more
    (setting,) = bench.ours("ppo", plain, **chosen, **ppo.files(bench))
    side, limit = _iterate(bench, "ours", setting), _LIMITS[bench.size]
    return _row(what, "a limit", side.rounds[-1]["peak_bytes"], limit, 1.0, {"ours": side})


def _against(bench: Bench, work: Work, setting: Setting) -> dict[str, Any]:
    """One of our settings of the timed iteration, and the peer's; our own PPO as the peer is compiled if ours is."""
    choice = setting.settings["compile"]
    what = f"{work.what}, compile {choice}"
    if bench.only not in what:
        return {}
    alike = [peer for peer in work.peers if peer.settings.get("compile", choice) == choice]
    sides = {name: _iterate(bench, name, of) for name, of in (("ours", setting), ("peer", alike[0]))}
    check_alike(work, sides["ours"], sides["peer"])
    peaks = [side.rounds[-1]["peak_bytes"] for side in sides.values()]
    return _row(what, work.peer, peaks[0], peaks[1], work.target, sides)


def _iterate(bench: Bench, name: str, setting: Setting) -> Side:
    """The side, over, after its iterations."""
    with ExitStack() as stack:
        side = stack.enter_context(Side(setting, bench.logs / f"{name}.log"))
        for _ in range(_ITERATIONS):
            side.round()
    return side


def _row(what: str, peer: str, mine: float, theirs: float, target: float, sides: dict[str, Side]) -> dict[str, Any]:
    console.print(f"[bold]{what}[/] against {peer}: {mine / 1e6:.0f} of {theirs / 1e6:.0f} MB, target {target}")
    return {
        "work": what,
        "peer": peer,
        "ours, MB": mine / 1e6,
        "peer, MB": theirs / 1e6,
        "ratio": mine / theirs,
        "target": target,
        "settings": {name: side.setting.label for name, side in sides.items()},
        "conditions": {name: side.facts for name, side in sides.items()},
        "rounds": {name: side.rounds for name, side in sides.items()},
    }
