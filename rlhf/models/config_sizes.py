"""The sizes that transformers have in common, in the names of config.json. Reading them imports no torch."""

from typing import Any

SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
}
"""Names of sizes in config.json, by their names here."""


def check_sizes(config: Any, *names: str) -> None:
    """Raise ValueError unless the fields `names` of a shape are whole numbers of at least 1."""
    for name in names:
        size = getattr(config, name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")


def read_sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes in a config.json by their names here. Raises ValueError if one is missing."""
    if missing := [name for name in SIZES.values() if name not in settings]:
        raise ValueError(f"{missing[0]} is missing")
    return {name: settings[theirs] for name, theirs in SIZES.items()}
