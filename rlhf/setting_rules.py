"""Rules for settings that have no effect in a run or contradict others, and the rules of every program that computes.

A setting counts as set if it differs from its default, whether by a flag or by YAML. A setting that asks for something
the run cannot provide is an error; one that merely has no effect is reported in a line. The rules of each training
stage are in `rlhf.stage_rules`. Importing this module imports no torch.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf.errors import UserError
from rlhf.ranges import flat_fields


class Rule(NamedTuple):
    """A condition under which settings have no effect or are refused."""

    names: tuple[str, ...]
    """Dotted names of the settings."""
    applies: Callable[[Any], bool]
    """config -> True if the settings have no effect."""
    reason: str | Callable[[Any], str]
    """Text of the line after the flags, with the remedy; a function computes it from the config."""
    refused: bool = False
    """Raise an error instead of reporting a line."""


def check_rules(config: Any, rules: Sequence[Rule]) -> list[str]:
    """Return a line for each rule under which a setting that differs from its default has no effect.

    Args:
        config: a configuration dataclass; a rule's names that are not among its fields are skipped.
        rules: the rules to check.

    Raises:
        UserError: a rule refuses a setting that differs from its default.
    """
    values, defaults = flat_fields(config), flat_fields(type(config)())
    lines = []
    for rule in rules:
        changed = [name for name in rule.names if name in values and values[name] != defaults[name]]
        if changed and rule.applies(config):
            reason = rule.reason if isinstance(rule.reason, str) else rule.reason(config)
            line = f"{', '.join(flag_of(name, values[name]) for name in changed)}: {reason}"
            if rule.refused:
                raise UserError(line)
            lines.append(line)
    return lines


def flag_of(name: str, value: Any = None) -> str:
    """Return the flag of a setting, followed by its value unless that is omitted, True or a tuple."""
    flag = name.replace("_", "-")
    if value is False:
        section, dot, last = flag.rpartition(".")
        return f"--{section}{dot}no-{last}"
    return f"--{flag}" if value is None or value is True or isinstance(value, tuple) else f"--{flag} {value}"


def _in_process(config: Any) -> bool:
    return not config.dist.num_workers


def _on_workers(config: Any) -> bool:
    return config.dist.num_workers > 0


_NO_WORKERS = "has no effect without --dist.num-workers"

COMPUTE_RULES = (
    Rule(("dist.address", "dist.num_servers", "dist.gpus_per_worker"), _in_process, _NO_WORKERS, refused=True),
    Rule(
        (
            "dist.threads_per_worker", "dist.oversubscribe", "dist.placement", "dist.backend", "dist.reduce",
            "dist.timeout_s", "dist.heartbeat_s", "dist.max_restarts", "dist.on_failure", "dist.snapshot_every",
        ),
        _in_process,
        _NO_WORKERS,
    ),
    Rule(
        ("dist.backend",),
        lambda config: _on_workers(config) and config.dist.backend == "nccl" and config.dist.gpus_per_worker != 1,
        "nccl needs --dist.gpus-per-worker 1: a whole GPU for each worker",
        refused=True,
    ),
    Rule(
        ("device",),
        lambda config: _on_workers(config) and config.device == "cuda" and not config.dist.gpus_per_worker,
        "workers compute on the CPU without --dist.gpus-per-worker; add it, or drop the flag",
        refused=True,
    ),
    Rule(
        ("device",),
        lambda config: _on_workers(config) and config.device == "cpu" and config.dist.gpus_per_worker > 0,
        "workers with --dist.gpus-per-worker compute on GPUs; drop one of the two",
        refused=True,
    ),
    Rule(("threads",), _on_workers, "has no effect on workers; use --dist.threads-per-worker"),
    Rule(
        ("threads",),
        lambda config: _in_process(config) and (config.threads or 0) > (os.cpu_count() or 1),
        f"more than this machine's {os.cpu_count()} cores, on which they wait for each other",
    ),
    Rule(
        ("dist.placement",),
        lambda config: _on_workers(config) and config.dist.address is None,
        "has no effect without --dist.address: there is one machine",
    ),
    Rule(
        ("dist.on_failure",),
        lambda config: _on_workers(config) and config.dist.max_restarts == 0,
        "has no effect with --dist.max-restarts 0",
    ),
)  # fmt: skip
"""Rules of every program that computes, on workers or in its own process."""
