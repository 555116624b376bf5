"""Rules for settings that have no effect in a run or contradict each other.

A setting counts as set if it differs from its default, whether by a flag or in YAML. A setting that asks for something
that the run cannot provide is an error; a setting that has no effect is reported in a line. The rules of the training
stages are in `rlhf.stage_rules`. Importing this module does not import torch.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf.errors import UserError
from rlhf.field_docs import documented
from rlhf.ranges import flat_fields


@documented
class Rule(NamedTuple):
    """Condition under which settings have no effect or are refused."""

    names: tuple[str, ...]
    """Dotted names of the settings."""
    applies: Callable[[Any], bool]
    """config -> True if the condition holds."""
    reason: str | Callable[[Any], str]
    """Text after the flags in the line, with the remedy, or a function config -> text."""
    refused: bool = False
    """True to raise an error instead of reporting a line."""


def check_rules(config: Any, rules: Sequence[Rule]) -> list[str]:
    """Return a line for each rule that applies to a setting that differs from its default.

    Args:
        config: a configuration dataclass. Names in rules that are not among its fields are skipped.
        rules: the rules to check.

    Raises:
        UserError: a rule refuses a setting that differs from its default.

    Example:
        >>> from rlhf.config import CheckpointConfig
        >>> rule = Rule(("checkpoint.keep",), lambda config: config.checkpoint.keep > 9, "takes a lot of space")
        >>> from rlhf.config import RunConfig
        >>> check_rules(RunConfig(checkpoint=CheckpointConfig(keep=20)), [rule])
        ['--checkpoint.keep 20: takes a lot of space']
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
    """Return the flag of a setting, followed by its value unless that is omitted, True or a tuple.

    Args:
        name: dotted name of the setting.
        value: value of the setting; False gives the `no-` form of the flag.

    Example:
        >>> flag_of("ppo.batch_size", 8), flag_of("ppo.stop_at_eos", False)
        ('--ppo.batch-size 8', '--ppo.no-stop-at-eos')
    """
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
        "workers compute on the CPU without --dist.gpus-per-worker; add that flag, or drop this one",
        refused=True,
    ),
    Rule(
        ("device",),
        lambda config: _on_workers(config) and config.device == "cpu" and config.dist.gpus_per_worker > 0,
        "workers with --dist.gpus-per-worker compute on GPUs; drop one of the two flags",
        refused=True,
    ),
    Rule(("threads",), _on_workers, "has no effect on workers; use --dist.threads-per-worker"),
    Rule(
        ("threads",),
        lambda config: _in_process(config) and (config.threads or 0) > (os.cpu_count() or 1),
        f"more threads than this machine's {os.cpu_count()} cores, which slows all of them down",
    ),
    Rule(
        ("dist.placement",),
        lambda config: _on_workers(config) and config.dist.address is None,
        "has no effect without --dist.address, because there is only one machine",
    ),
    Rule(
        ("dist.on_failure",),
        lambda config: _on_workers(config) and config.dist.max_restarts == 0,
        "has no effect with --dist.max-restarts 0",
    ),
)  # fmt: skip
"""Rules of every program that computes, in its own process or on workers."""

COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "margin")
"""Names of the columns that the programs read."""


def _misnamed(config: Any) -> list[str]:
    """Return the entries of --data.columns that are not name=column."""
    return [pair for pair in config.data.columns if pair.partition("=")[0] not in COLUMNS or not pair.partition("=")[2]]


DATA_RULES = (
    Rule(
        ("data.columns",),
        lambda config: bool(_misnamed(config)),
        lambda config: (
            f"{_misnamed(config)[0]!r} is not name=column, such as prompt=question; names are {', '.join(COLUMNS)}"
        ),
        refused=True,
    ),
)
"""Rules of every program that reads data files."""
