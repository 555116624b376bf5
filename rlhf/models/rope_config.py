"""The settings of rotary position embeddings in config.json, in their old and new forms. This module needs no torch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.field_docs import documented

_PARTS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
"""Numbers of each kind of scaling; llama3 also has `original_max_position_embeddings`."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary frequencies for a longer context, in the names of `rope_scaling` in config.json."""

    rope_type: str
    """Kind of scaling: `linear` divides all frequencies by `factor`, and `llama3` only those of long waves."""
    factor: float
    """Factor by which the context grows, above 0."""
    low_freq_factor: float = 1.0
    """Waves longer than the original context divided by this number are long."""
    high_freq_factor: float = 4.0
    """Waves shorter than the original context divided by this number keep their frequency."""
    original_max_position_embeddings: int = 8192
    """Context before scaling, in tokens."""

    def __post_init__(self) -> None:
        if self.rope_type not in _PARTS:
            raise ValueError(f"rope_type is {self.rope_type!r}, expected default, {' or '.join(_PARTS)}")
        for name in _PARTS[self.rope_type]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"rope_scaling: {name} must be above 0, got {value!r}")
        if self.rope_type == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"rope_scaling: high_freq_factor must be above low_freq_factor ({self.low_freq_factor}), got "
                f"{self.high_freq_factor}"
            )


@documented
class Rope(NamedTuple):
    """Rotary position embeddings as config.json describes them."""

    theta: float
    """Base of the wavelengths."""
    scaling: RopeScaling | None
    """Scaling of the frequencies, or None."""
    partial_rotary_factor: float
    """Share of each head that is rotated."""


def read_rope(settings: dict[str, Any], *, share: float = 1.0) -> Rope:
    """Return the rotary embeddings of a config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    Args:
        settings: contents of config.json.
        share: share of each head that is rotated if config.json names none.

    Raises:
        ValueError: their type is not supported. The message names it.

    Example:
        >>> read_rope({"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}).scaling.factor
        2.0
    """
    given = settings.get("rope_parameters") or {}
    scaling = settings.get("rope_scaling") or {}
    for name, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
            raise ValueError(f"{name} is {value!r}, expected one object for all layers")
    given = given | scaling
    theta = given.get("rope_theta", settings.get("rope_theta", settings.get("rotary_emb_base", 10000.0)))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise ValueError(f"rope_theta must be above 0, got {theta!r}")
    old_share = settings.get("partial_rotary_factor", settings.get("rotary_pct", share))
    share = given.get("partial_rotary_factor", old_share)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope(float(theta), None, share)
    if kind not in _PARTS:
        raise ValueError(f"rope_type is {kind!r}, expected default, {' or '.join(_PARTS)}")
    if missing := [name for name in _PARTS[kind] if name not in given]:
        raise ValueError(f"rope_scaling of type {kind} has no {missing[0]}")
    original = given.get("original_max_position_embeddings", settings.get("max_position_embeddings", 8192))
    numbers = {name: given[name] for name in _PARTS[kind]}
    return Rope(float(theta), RopeScaling(rope_type=kind, original_max_position_embeddings=original, **numbers), share)


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return the settings that `read_rope` reads, in the form of every version of `transformers`.

    Example:
        >>> write_rope(Rope(10000.0, None, 1.0))["rope_theta"]
        10000.0
    """
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope.scaling is not None:
        kind = rope.scaling.rope_type
        scaling = {"rope_type": kind} | {name: getattr(rope.scaling, name) for name in _PARTS[kind]}
        if kind == "llama3":
            scaling |= {"original_max_position_embeddings": rope.scaling.original_max_position_embeddings}
    parameters = scaling | {"rope_theta": rope.theta}
    if rope.partial_rotary_factor != 1.0:
        parameters |= {"partial_rotary_factor": rope.partial_rotary_factor}
    old = None if rope.scaling is None else scaling
    return {"rope_parameters": parameters, "rope_theta": rope.theta, "rope_scaling": old}
