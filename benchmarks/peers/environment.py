"""Makes the peers' environment: a virtual environment, and in it a folder with the last TRL that has PPO."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TRL_WITH_PPO = "trl-with-ppo"
"""Folder in the environment."""


def make(folder: Path) -> None:
    """Install what the requirements files pin; a few minutes and about 2 GB."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--requirement", str(HERE / "requirements.txt")], check=True)
    target = ["--no-deps", "--upgrade", "--target", str(folder / TRL_WITH_PPO)]
    subprocess.run([*pip, *target, "--requirement", str(HERE / "requirements-ppo.txt")], check=True)


def python_of(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "bin" / "python"


def check(folder: Path) -> None:
    """Exit with the remedy where the environment is missing."""
    if not os.access(python_of(folder), os.X_OK):
        raise SystemExit(f"{folder}: no peers are installed here; run `python -m benchmarks peers --peers {folder}`")
