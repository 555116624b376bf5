"""RLHF for GPT-2-style language models: pure functions over pytrees of tensors, and the stages built from them.

`import rlhf` imports nothing heavy; each name in `__init__.pyi` is loaded from its module when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
