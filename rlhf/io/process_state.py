"""Process-wide settings that a user's code may change, and their restoration."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf.io.user_log import LOGGER, log_user


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # None is faster: no mode around every call


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (os.getcwd, os.chdir),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's deterministic algorithms": (
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    "the logger rlhf": (lambda: LOGGER.disabled, lambda disabled: setattr(LOGGER, "disabled", disabled)),
}
"""(read, write) functions of each setting, by its name in messages."""

_reported: set[str] = set()
"""Names of user code whose changes were reported."""


@contextmanager
def restored_process(what: str) -> Iterator[None]:
    """Restore the settings after a user's code in the block; report those it changed once per `what`."""
    values = {name: read() for name, (read, _) in _SETTINGS.items()}
    try:
        yield
    finally:
        changed = [name for name, value in values.items() if _differs(name, value)]
        for name in changed:
            _SETTINGS[name][1](values[name])
        if changed and what not in _reported:
            _reported.add(what)
            log_user(f"{what}: changed {', '.join(changed)}; put back")


def _differs(name: str, value: Any) -> bool:
    try:
        return bool(_SETTINGS[name][0]() != value)
    except OSError:  # the working directory was removed
        return True
