"""Model families, heads and decoding: what the library asks of a decoder, and the table of those it has."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["gpt2"])  # so that `rlhf.gpt2` finds it
