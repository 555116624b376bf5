"""The sizes that transformers have in common, and their names in config.json. This module needs no torch."""

from typing import Any

SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
}
"""Names of sizes in config.json, by the names of fields."""


def check_sizes(config: Any, *names: str) -> None:
    """Check that the fields `names` of a shape are whole numbers of at least 1.

    Args:
        config: shape of a model.
        *names: names of the fields to check.

    Raises:
        ValueError: a size is not. The message names it.

    Example:
        >>> check_sizes(rlhf.PRESETS["tiny"], "n_layer", "n_head")
    """
    for name in names:
        size = getattr(config, name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")


def read_sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes in a config.json by the names of fields.

    Raises:
        ValueError: a field is missing. The message names it.

    Example:
        >>> settings = {name: 8 for name in SIZES.values()}
        >>> read_sizes(settings)["n_embd"]
        8
    """
    if missing := [name for name in SIZES.values() if name not in settings]:
        raise ValueError(f"{missing[0]} is missing")
    return {name: settings[theirs] for name, theirs in SIZES.items()}
