"""What the programs share: reading --config before the flags, and turning errors into messages and exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from rlhf.config import PipelineRun, RunConfig, flat_fields
from rlhf.errors import Interrupted, NonFiniteError, UserError, WorkersLostError
from rlhf.io.presets import load_config


def base_config(argv: Sequence[str]) -> PipelineRun:
    """The configuration that flags are put on top of: that of --config (the last, if several), or the defaults."""
    name = None
    for place, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            if not equals and place + 1 == len(argv):
                raise UserError("--config: expected a YAML file or the name of a preset")
            name = value if equals else argv[place + 1]
    return PipelineRun() if name is None else load_config(name)


def run_command(command: Callable[[], None]) -> int:
    """Run a program; its exit code. Errors that are the user's to mend become one message without a traceback."""
    try:
        command()
    except (UserError, NonFiniteError, WorkersLostError, Interrupted) as error:
        print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has left (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped at once; nothing was saved since the last checkpoint", file=sys.stderr)
        return 130
    except Exception:  # a defect of ours: show everything
        traceback.print_exc()
        return 1
    return 0


def describe(config: RunConfig) -> str:
    """The settings that differ from their defaults, in one line."""
    defaults = flat_fields(type(config)())
    changed = {name: value for name, value in flat_fields(config).items() if value != defaults[name]}
    shown = "  ".join(
        f"{name}={' '.join(value) if isinstance(value, tuple) else value}" for name, value in changed.items()
    )
    return shown or "all settings at their defaults"
