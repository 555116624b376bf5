"""Identity of PPO's reward sources: the weights of a model folder, the name and code of a function."""

import ast
import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.io.files import sha256
from rlhf.io.model_folder import weights_digest
from rlhf.io.paths import parse_source, same_place

Source = dict[str, Any]
"""A source as JSON: `spec`, `weight`, and the digest of a `model`, or a `function` with the digest of its `code`."""


def identify_sources(specs: Sequence[str]) -> list[Source]:
    """Return the identity of each source.

    Raises:
        UserError: a source is neither a model folder nor an importable function.
    """
    return [_identify(spec) for spec in specs]


def diff_sources(before: Sequence[Source], now: Sequence[Source]) -> tuple[list[str], list[str]]:
    """Return the changes between two lists of sources that prevent resuming, and notes for the user.

    A change of a function's code gives a note, because a run whose function failed is resumed after fixing it. So does
    a change of a gold source, which does not affect the training.
    """
    changes, notes = [], []
    old, new = ([source for source in sources if source["weight"]] for sources in (before, now))
    if [(source["weight"], source["function"]) for source in old] != [(s["weight"], s["function"]) for s in new]:
        return [f"ppo.reward was {_specs(before)}, is {_specs(now)}"], []
    for first, second in zip(old, new, strict=True):
        if first["model"] != second["model"]:
            changes.append(f"ppo.reward {second['spec']}: a reward model's weights or statistics have changed")
        if first["code"] != second["code"]:
            notes.append(
                f"WARNING: --ppo.reward {second['spec']}: the code of the function has changed; scores from here on "
                "are the new code's. For one reward throughout, undo the change, or choose another --output-dir"
            )
    if _gold(before) != _gold(now):
        notes.append(f"the gold sources have changed: ppo.reward was {_specs(before)}, is {_specs(now)}")
    return changes, notes


def upgrade_sources(specs: Sequence[str], digests: Sequence[str], now: Sequence[Source]) -> list[Source]:
    """Return the sources of an older checkpoint, which has no digests of code.

    Args:
        specs: the sources as the user wrote them; empty for the run's reward model.
        digests: digests of the sources that are model folders, in order.
        now: the sources of the resumed run, whose code is assumed for functions of the same module.
    """
    remaining, sources = list(digests), []
    for number, spec in enumerate(specs or ["reward"]):
        weight, target = parse_source(spec)
        module, _, function = target.rpartition(":")
        source: Source = {"spec": spec, "weight": weight, "model": None, "function": None, "code": None}
        if not module or Path(target).is_dir():
            source["model"] = remaining.pop(0) if remaining else None
        else:
            match = now[number] if number < len(now) else source
            same = same_place(module, Path(parse_source(match["spec"])[1].rpartition(":")[0]))
            source |= {"function": function, "code": match["code"] if same else ""}
        sources.append(source)
    return sources


def code_digest(target: str) -> str:
    """Return the hex digest of a function's module and the modules of its folder that it imports; empty for a built-in.

    Args:
        target: `module:function` or `file.py:function`; the module has been imported.
    """
    module = target.rpartition(":")[0]
    file = Path(module) if module.endswith(".py") else _file_of(module)
    if file is None or not file.is_file():
        return ""
    files: dict[str, Path] = {}
    _add_imports(file, files)
    siblings = [f"{name}:{sha256(path)}" for name, path in sorted(files.items()) if path != file]
    return hashlib.sha256("\n".join([sha256(file), *siblings]).encode()).hexdigest()


def _identify(spec: str) -> Source:
    weight, target = parse_source(spec)
    if Path(target).is_dir():
        return {"spec": spec, "weight": weight, "model": weights_digest(Path(target)), "function": None, "code": None}
    function = target.rpartition(":")[2]
    return {"spec": spec, "weight": weight, "model": None, "function": function, "code": code_digest(target)}


def _gold(sources: Sequence[Source]) -> list[tuple[str, ...]]:
    return [(s["model"], s["function"], s["code"]) for s in sources if not s["weight"]]


def _specs(sources: Sequence[Source]) -> str:
    return " ".join(source["spec"] for source in sources)


def _file_of(module: str) -> Path | None:
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin)
    return None


def _add_imports(file: Path, files: dict[str, Path]) -> None:
    """Add a file, and the modules of its folder that it imports, directly or through each other."""
    files[file.stem] = file
    for name in _imported_names(file):
        sibling = file.with_name(f"{name}.py")
        if name not in files and sibling.is_file():
            _add_imports(sibling, files)


def _imported_names(file: Path) -> Iterator[str]:
    """Yield the names in a file's imports that a module of the same folder may have."""
    with contextlib.suppress(SyntaxError, ValueError):  # no Python source, such as an extension module
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level <= 1:
                yield from (node.module.partition(".")[0],) if node.module else (alias.name for alias in node.names)
