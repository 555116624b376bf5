"""The default cache folder, for tokenised data and compiled code."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from rlhf.errors import UserError
from rlhf.io.user_log import log_user


def default_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/rlhf or ~/.cache/rlhf, or a temporary folder if the home folder is not writable.

    A relative XDG_CACHE_HOME is ignored, as its specification requires.

    Raises:
        UserError: no temporary folder can be created either.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache / "rlhf"
    home = home_folder()
    return _temporary_cache() if home is None else home / ".cache" / "rlhf"


def home_folder() -> Path | None:
    """Return the user's home folder; None if there is none or it is not writable."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the password file
        return None
    existing = next((folder for folder in (home, *home.parents) if folder.exists()), home)
    return home if home.is_absolute() and os.access(existing, os.W_OK | os.X_OK) else None


@functools.cache
def _temporary_cache() -> Path:
    """Create a temporary folder, which is removed when the process exits."""
    try:
        folder = tempfile.mkdtemp(prefix="rlhf-cache-")
    except OSError as error:
        raise UserError(
            f"no folder for the cache can be written, neither in the home folder nor a temporary one "
            f"({error.strerror}); name one: --cache-dir FOLDER"
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log_user(
        f"the home folder cannot be written: the cache is in {folder} until the program ends; keep it with "
        "--cache-dir FOLDER or XDG_CACHE_HOME"
    )
    return Path(folder)
