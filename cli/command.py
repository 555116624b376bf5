"""Parts that all programs share: the configuration below the flags, error messages and exit codes."""

import dataclasses
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.cli.process import discard_output, flush_output, prepared_process
from rlhf.cli.terminal import user_log_on_stderr

from rlhf.config import PipelineRun, RunConfig
from rlhf.errors import Interrupted, NonFiniteError, UserError, WorkersLostError
from rlhf.io.near_misses import MODEL_FOLDER
from rlhf.io.paths import relocate
from rlhf.io.presets import load_config, load_dist_config
from rlhf.ranges import flat_fields
from rlhf.stages import pipeline_type


def base_config(argv: Sequence[str]) -> PipelineRun:
    """Return the configuration below the flags: that of --config or the defaults, overridden by --dist-config."""
    name, dist_name = _last_value(argv, "--config"), _last_value(argv, "--dist-config")
    config = pipeline_type()() if name is None else relocate(load_config(name), Path(name).expanduser().parent)
    return config if dist_name is None else dataclasses.replace(config, dist=load_dist_config(dist_name))


def _last_value(argv: Sequence[str], name: str) -> str | None:
    """Return the last value of a flag, or None without the flag."""
    last = None
    for position, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") == name:
            if not equals and position + 1 == len(argv):
                raise UserError(f"{name}: expected a YAML file or the name of a preset")
            last = value if equals else argv[position + 1]
    return last


_SPINS = "10000"
"""Number of times that a waiting thread spins before it sleeps. With OpenMP's default of 300,000, a step of the small
model beside two busy processes takes 1,170 ms instead of 330 ms. On idle cores there is no difference."""


_UNWRITABLE_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
"""Error numbers of streams, which have no file name."""


def run_command(command: Callable[[], None]) -> int:
    """Run a program and return its exit code. Errors that the user can fix become one line without a traceback."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # messages about connections are not for the user
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read when torch is imported
    with prepared_process(), user_log_on_stderr():
        return _exit_code(command)


def _exit_code(command: Callable[[], None]) -> int:
    """Run a command and return its exit code, after printing the error that ended it."""
    try:
        try:
            command()
        finally:
            flush_output()
    except (UserError, NonFiniteError, WorkersLostError, Interrupted) as error:
        print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of the output is gone (| head)
        discard_output()
        return 0
    except KeyboardInterrupt:
        print("stopped immediately; nothing has been saved since the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # the operating system refuses the path
            print(f"error: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
            return UserError.exit_code
        if isinstance(error, OSError) and error.errno in _UNWRITABLE_OUTPUT:
            print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
            discard_output()
            return UserError.exit_code
        traceback.print_exc()  # a defect of rlhf: show the traceback
        return 1
    return 0


def check_inputs(files: dict[str, Any], models: dict[str, Any]) -> None:
    """Raise UserError if an input is not there. Programs call this before they import torch, which takes seconds.

    Args:
        files: data by flag: a path, several, or None.
        models: model folders by flag, in the same form.
    """
    for flag, value in (files | models).items():
        kind = "file" if flag in files else "folder"
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and not path.exists():
                raise UserError(f"{path}: no such {kind} ({flag})" + ("" if flag in files else f"; {MODEL_FOLDER}"))


def describe(config: RunConfig) -> str:
    """Return the settings that differ from their defaults, in one line."""
    defaults = flat_fields(type(config)())
    changed = {name: value for name, value in flat_fields(config).items() if value != defaults[name]}
    shown = "  ".join(
        f"{name}={' '.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in changed.items()
    )
    return shown or "all settings at their defaults"
