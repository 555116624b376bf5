"""A pytest plugin that hides the folder rlhf/kernels, as if it had been deleted: `pytest -p no_kernels`."""

import sys
from importlib.abc import MetaPathFinder


class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["rlhf", "kernels"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Hidden())
