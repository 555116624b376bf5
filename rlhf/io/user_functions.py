"""Users' Python functions: import by name, and calls whose results are checked."""

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import NonFiniteError, UserError
from rlhf.io.process_state import restored_process

_PREFIX = "rlhf_user_"
"""Beginning of the names of the modules that are loaded from files."""


def load_function(target: str, where: str, problem: str = "it is not") -> Callable[..., Any]:
    """Import and return `module:function` or `file.py:function`.

    Args:
        target: the function.
        where: the text that the user wrote, for errors.
        problem: beginning of the error if the target has another form.

    Raises:
        UserError: the target has another form, cannot be imported, or is not a function.
    """
    module, separator, name = target.rpartition(":")
    if not separator or not module or not name:
        raise UserError(f"{where}: {problem} module:function or file.py:function")
    with restored_process(where):
        function = getattr(_import(module, where), name, None)
    if not callable(function):
        file = Path(getattr(sys.modules.get(module), "__file__", None) or Path.cwd() / module)
        origin = "" if Path.cwd() in file.parents else f" ({file})"  # perhaps an installed one of the same name
        raise UserError(f"{where}: {module}{origin} has no function {name!r}")
    called = (function, getattr(function, "__call__", None))  # noqa: B004
    if any(inspect.iscoroutinefunction(part) or inspect.isasyncgenfunction(part) for part in called):
        raise UserError(f"{where}: {name} is an async function, which is not awaited here; write it with plain def")
    return function


def users_modules() -> list[ModuleType]:
    """Return the modules of the files that users' functions came from, and the modules of their folders.

    Other machines cannot import them by name, so they are sent there. A package counts as one module.
    """
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if "." not in name}
    places = {name: Path(file) for name, file in files.items() if file}
    folders = {path.resolve().parent for name, path in places.items() if name.startswith(_PREFIX)}

    def folder(path: Path) -> Path:
        return path.parent.parent if path.stem == "__init__" else path.parent

    return [sys.modules[name] for name, path in places.items() if folder(path) in folders and name != "rlhf"]


def check_signature(
    function: Callable[..., Any], what: str, texts: Collection[str], columns: Collection[str] | None = None
) -> None:
    """Refuse a function that `call_function` cannot call.

    Args:
        function: a user's function.
        what: name of the function in errors, such as "judge kindness".
        texts: names of the lists of texts that it gets.
        columns: columns of the data file; None allows any other argument.

    Raises:
        UserError: the function does not accept the texts by keyword, or has other required arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in: errors show in its first call
        return
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {parameter.name for parameter in signature.parameters.values() if parameter.kind not in variadic}
    extra = (names if columns is None else names & set(columns)) - {"prompt"}
    try:
        signature.bind(**dict.fromkeys({*texts, *extra}))
    except TypeError as error:
        arguments = f"{', '.join(texts)} and the columns of its file that it accepts"
        known = f" ({', '.join(sorted({*columns} - {'prompt'})) or 'there are none'})" if columns is not None else ""
        raise UserError(f"{what}: {error}; it is called with {arguments}{known}, by keyword") from error


def call_function(
    function: Callable[..., Any], what: str, columns: Sequence[dict[str, Any]], **texts: Sequence[Any]
) -> list[float]:
    """Return one finite float per text from a user's function.

    Args:
        function: user's function, which is called with `texts` and a list for each column that it accepts, by keyword.
        what: name of the function in errors, such as "judge kindness".
        columns: the records that the texts belong to.
        **texts: lists as long as `columns`; the last one holds the texts that are scored.

    Raises:
        UserError: the function raises, or does not return one number per text.
        NonFiniteError: a number is NaN or infinite.
    """
    names = sorted({name for record in columns for name in record} - {"prompt", *texts})
    try:
        accepted = inspect.signature(function).parameters.values()
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted):
            names = [name for name in names if name in {parameter.name for parameter in accepted}]
        extra = {name: [record.get(name) for record in columns] for name in names}
        with restored_process(what):
            scores = function(**{name: list(column) for name, column in texts.items()}, **extra)
    except (Exception, SystemExit) as error:  # the user's code: its errors are reported in one line
        raise UserError(f"{what}: raised {describe_error(error)}") from error
    if is_async(scores):
        raise UserError(f"{what}: returned a coroutine (async), expected a list of numbers; write it with plain def")
    values = _as_floats(what, scores, len(columns))
    scored = list(texts.values())[-1]
    for prompt, text, value in zip(texts["prompts"], scored, values, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(f"{what} is {value} for the completion {text!r} of {prompt!r}")
    return values


def describe_error(error: BaseException) -> str:
    """Return an exception in one line, with the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def is_async(result: Any) -> bool:
    """Return whether a function's result is awaitable, and close it to avoid Python's warning."""
    if inspect.iscoroutine(result):
        result.close()
    return inspect.isawaitable(result) or inspect.isasyncgen(result)


def _as_floats(what: str, scores: Any, count: int) -> list[float]:
    expected = f"{what}: expected a list of {count} numbers"
    try:
        if isinstance(scores, str | bytes | dict):
            raise TypeError(f"it is a {type(scores).__name__}")
        values = [float(score) for score in scores]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{expected}, got {str(scores)[:80]!r} ({error})") from error
    if len(values) != count:
        raise UserError(f"{expected}, got {len(values)}")
    return values


def _import(module: str, where: str) -> ModuleType:
    """Import a module by name, also from the working directory, or a file by path."""
    try:
        if not module.endswith(".py"):
            _search(Path.cwd())
            return importlib.import_module(module)
        path = Path(module).resolve()
        _search(path.parent)
        name = f"{_PREFIX}{path.stem}_{zlib.crc32(str(path).encode('utf-8', 'surrogateescape')):08x}"
        location = importlib.util.spec_from_file_location(name, module)
        if location is None or location.loader is None:
            raise ImportError("not a Python file")
        loaded = importlib.util.module_from_spec(location)
        sys.modules[location.name] = loaded  # dataclasses and pickle look there
        location.loader.exec_module(loaded)
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"{where}: {module} cannot be imported ({error})") from error
    except (Exception, SystemExit) as error:  # it is the user's code
        raise UserError(f"{where}: {module} cannot be imported ({type(error).__name__}: {error})") from error
    _check_siblings(loaded, path.parent, where)
    return loaded


def _search(folder: Path) -> None:
    """Append a folder to the module search path, after installed modules, so that a user's random.py hides none."""
    if str(folder) not in sys.path and not (Path() in map(Path, sys.path) and folder == Path.cwd()):
        sys.path.append(str(folder))


def _check_siblings(loaded: ModuleType, folder: Path, where: str) -> None:
    """Refuse a module that imports a module of its folder by name but got another one of that name.

    Python keeps one module per name, the first that was imported from any folder.
    """
    imported = {getattr(value, "__module__", None) for value in vars(loaded).values()}
    imported |= {value.__name__ for value in vars(loaded).values() if isinstance(value, ModuleType)}
    for path in folder.glob("*.py"):
        file = getattr(sys.modules.get(path.stem), "__file__", None)
        if path.stem in imported and path.stem not in sys.stdlib_module_names and file and Path(file).resolve() != path:
            raise UserError(f"{where}: {path.stem} comes from {file}, though {path} lies beside it; rename one of them")
