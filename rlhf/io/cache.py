"""The folder of the cache: tokenised data and compiled code, which can be made again."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from rlhf.errors import UserError
from rlhf.io.user_log import log_user


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/rlhf, or ~/.cache/rlhf, or a temporary folder where the home folder cannot be written.

    A relative XDG_CACHE_HOME is ignored, as its specification asks for.

    Raises:
        UserError: not even a temporary folder can be made.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache.is_absolute():
        return cache / "rlhf"
    home = home_folder()
    return _temporary_cache() if home is None else home / ".cache" / "rlhf"


def home_folder() -> Path | None:
    """The user's home folder; None where there is none, or it cannot be written."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the password file
        return None
    existing = next((folder for folder in (home, *home.parents) if folder.exists()), home)
    return home if home.is_absolute() and os.access(existing, os.W_OK | os.X_OK) else None


@functools.cache
def _temporary_cache() -> Path:
    """A folder of this process, removed at its end."""
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
