"""Model families, heads and decoding: what the library asks of a decoder, and the table of those it has."""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Import `gpt2` when it is first used, which `rlhf.gpt2` reads from here."""
    if name == "gpt2":
        return importlib.import_module("rlhf.models.gpt2")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
