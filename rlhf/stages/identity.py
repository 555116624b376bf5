"""What must not change between a run and its continuation."""

from typing import Any

from rlhf.config import RunConfig
from rlhf.ranges import flat_fields

Facts = dict[str, Any]
"""Plain values, beside the executor's state, that the next step reads; they go into the checkpoint as JSON."""

_FREE_TO_CHANGE = ("config", "output_dir", "resume", "cache_dir", "start_at", "checkpoint.", "log.", "dist", "threads")
"""Settings that may differ when a run is resumed: but for the threads they do not change a bit of its results."""

_OF_STAGE = {
    "sft": ("sft.", "sft_val_data", "model.", "tokenizer."),
    "reward": ("reward.", "preference_val_data"),
    "ppo": ("ppo.",),
}
"""Settings that have a say in one stage alone; of the data it learns from, the content counts and not the name."""

_DATA = {"sft": "sft_data", "reward": "preference_data", "ppo": "prompt_data"}
"""By stage."""


def settings_of(config: RunConfig, stage: str) -> Facts:
    """Every setting that has a say in the stage's results, as JSON values."""
    others = tuple(name for other, names in _OF_STAGE.items() if other != stage for name in names)
    free = (*_FREE_TO_CHANGE, *_DATA.values(), *others)
    return {name: _json(value) for name, value in flat_fields(config).items() if not name.startswith(free)}


def changes(config: RunConfig, stage: str, before: Facts, now: Facts) -> list[str]:
    """What of a run's identity has changed, in words; digests are told as the content that they stand for."""
    data = getattr(config, _DATA[stage]) or "the embedded example"
    contents = {
        "data": f"{data} has changed",
        "model": "the weights that the stage starts from have changed",
        "reward": "a reward model's weights or statistics have changed",
    }
    return [
        f"{name} was other: {contents[name]}" if name in contents else f"{name} was {before.get(name)}, is {now[name]}"
        for name in sorted(now)
        if before.get(name) != now[name]
    ]


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
