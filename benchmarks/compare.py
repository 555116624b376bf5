"""One piece of work on both sides: the best setting of each, then rounds in turn, then a row of the table."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.bench import Bench
from benchmarks.sides import Setting, Side, SideError
from benchmarks.timing import console, interleave, ratio, report, spread, summary, write
from rlhf.distributed.compute_context import lacks_bf16

_TRIALS = 4
"""Rounds by which a side's settings are told apart, after one for compilation."""
_PATIENCE = 20.0
"""Seconds after which a trial has no further round."""
_WARMUP = 2
"""Rounds that are not counted: compilation, caches, the allocator's growth."""


@dataclass(frozen=True)
class Work:
    """Something both sides do."""

    what: str
    peer: str
    """Whom we are compared with."""
    ours: tuple[Setting, ...]
    """Our settings; the fastest is taken."""
    peers: tuple[Setting, ...]
    """The peer's settings; the fastest is taken."""
    target: float
    """The ratio to reach, ours over the peer's."""
    least: Callable[[int], list[roofline.Phase]]
    """The phases of a round, for numbers of so many bytes."""
    same_tokens: bool = True
    """Whether both sides get the same tokens; otherwise only their rates are compared."""
    exact: bool = True
    """Whether both must compute in IEEE fp32."""


def compare_all(name: str, works: list[Work], bench: Bench) -> list[Path]:
    """Measure rows one after the other, then print and write the table; return the JSON file, if there is a row."""
    rows, title = [], f"{name}-{bench.size}-{bench.device}"
    for work in works:
        if bench.only in work.what:
            rows.append(compare(work, rounds=bench.rounds, device=bench.device, logs=bench.logs))
            write(title, rows, bench.output)
            console.print(f"  ratio {rows[-1]['ratio']:.3g}, target {work.target}")
    return [report(title, rows, bench.output)] if rows else []


def compare(work: Work, *, rounds: int, device: str, logs: Path) -> dict[str, Any]:
    """Measure one piece of work; returns its row.

    Raises:
        SideError: a side fails, or both do not do the same work under the same conditions.
    """
    console.print(f"[bold]{work.what}[/] against {work.peer}")
    ours, tried_ours = _fastest(_supported(work.ours, device), logs)
    peer, tried_peers = _fastest(_supported(work.peers, device), logs)
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(setting, logs / f"{name}.log"))
            for name, setting in (("ours", ours), ("peer", peer))
        }
        narrow = ours.settings.get("precision") == "bf16"
        limits = roofline.measures(device, torch.bfloat16 if narrow else torch.float32)
        times = interleave({name: side.round for name, side in sides.items()} | limits, rounds, warmup=_WARMUP)
    check_alike(work, sides["ours"], sides["peer"])
    tokens = {name: [facts["tokens"] for facts in side.rounds[-rounds:]] for name, side in sides.items()}
    rates = {name: [n / s for n, s in zip(tokens[name], times[name], strict=True)] for name in sides}
    flops = roofline.product_flops(device) / min(times["product"])  # limits: the best round
    bandwidth = roofline.copy_bytes(device) / min(times["copy"])
    least = roofline.least_seconds(work.least(2 if narrow else 4), flops=flops, bandwidth=bandwidth)
    return {
        "work": work.what,
        "peer": work.peer,
        "ours, ms": spread(times["ours"]),
        "peer, ms": spread(times["peer"]),
        "ours, tokens/s": statistics.median(rates["ours"]),
        "peer, tokens/s": statistics.median(rates["peer"]),
        "ratio": ratio(rates["ours"], rates["peer"]),
        "target": work.target,
        "of roofline": least / summary(times["ours"])["median"],
        "settings": {"ours": ours.label, "peer": peer.label},
        "tried": {"ours": tried_ours, "peer": tried_peers},
        "seconds": times,
        "tokens": tokens,
        "conditions": {name: side.facts for name, side in sides.items()},
        "peak_bytes": {name: side.rounds[-1]["peak_bytes"] for name, side in sides.items()},
        "machine limits": {"flops": flops, "bytes_per_s": bandwidth, "least_s": least},
    }


def _supported(settings: tuple[Setting, ...], device: str) -> tuple[Setting, ...]:
    """All of them, or where bf16 is slow those without it, if there are any."""
    if not lacks_bf16(torch.device(device)):
        return settings
    return tuple(setting for setting in settings if setting.settings.get("precision") != "bf16") or settings


def _fastest(settings: tuple[Setting, ...], logs: Path) -> tuple[Setting, dict[str, Any]]:
    """The setting with the highest rate, and the best that each reached in tokens/s (or why it failed)."""
    if len(settings) == 1:
        return settings[0], {}
    tried: dict[str, Any] = {}
    for number, setting in enumerate(settings):
        try:
            with Side(setting, logs / f"trial-{number}.log") as side:
                tried[setting.label] = _best_rate(side)
        except SideError as error:
            tried[setting.label] = str(error)
        console.print(f"  {setting.label}: {tried[setting.label]} tokens/s", highlight=False, soft_wrap=True)
    reached = {label: value for label, value in tried.items() if isinstance(value, float)}
    if not reached:
        raise SideError(f"no setting works: {tried}")
    best = max(reached, key=lambda label: reached[label])
    return next(setting for setting in settings if setting.label == best), tried


def _best_rate(side: Side) -> float:
    """Useful tokens per second of a side's best round; what compiles late has some rounds to settle."""
    side.round()
    rates: list[float] = []
    begun = time.perf_counter()
    while len(rates) < _TRIALS and (not rates or time.perf_counter() < begun + _PATIENCE):
        started = time.perf_counter()
        side.round()
        rates.append(side.rounds[-1]["tokens"] / (time.perf_counter() - started))
    return max(rates)


def check_alike(work: Work, ours: Side, peer: Side) -> None:
    """See that both sides worked under the same conditions, on as many parameters and tokens.

    Raises:
        SideError: they did not.
    """
    for name in ("parameters", "threads", "torch"):
        if ours.facts[name] != peer.facts[name]:
            raise SideError(f"{work.what}: {name} differ: ours {ours.facts[name]}, the peer's {peer.facts[name]}")
    if work.exact and max(ours.facts["fp32_error"], peer.facts["fp32_error"]) > 1e-5:
        raise SideError(f"{work.what}: float32 products are not IEEE: {ours.facts} {peer.facts}")
    for mine, theirs in zip(ours.rounds, peer.rounds, strict=True):
        if work.same_tokens and mine["tokens"] != theirs["tokens"]:
            raise SideError(f"{work.what}: tokens of a round differ: {mine['tokens']} and {theirs['tokens']}")
    losses = [side.rounds[0].get("loss") for side in (ours, peer)]
    if work.exact and work.same_tokens and None not in losses and abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
        raise SideError(f"{work.what}: the first round's last losses differ: {losses}")
