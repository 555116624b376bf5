"""Training: the loop and its observers, the table of stages with one file per stage, and the pipeline."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
