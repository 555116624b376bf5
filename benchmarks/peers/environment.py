"""Makes the peers' environment: a virtual environment, and in it a folder with the last TRL that has PPO."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
TRL_WITH_PPO = "trl-with-ppo"
"""Folder in the environment."""
_REQUIREMENTS = ("requirements.txt", "requirements-ppo.txt")
_TORCH_INDEX = "https://download.pytorch.org/whl/"
"""Has the builds of torch whose version ends in +cpu or +cu130, which PyPI has not."""


def make(folder: Path) -> None:
    """Install the torch that runs here, and what the requirements files pin; a few minutes and about 2 GB."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for arguments in _installs(folder, version("torch")):
        subprocess.run([str(python_of(folder)), "-m", "pip", "install", "--quiet", *arguments], check=True)


def _installs(folder: Path, torch: str) -> list[list[str]]:
    """Arguments of pip, one call after the other; torch comes first, and stays since nothing else asks for another."""
    build = torch.partition("+")[2]
    index = ["--extra-index-url", _TORCH_INDEX + build] if build else []
    beside = ["--no-deps", "--upgrade", "--target", str(folder / TRL_WITH_PPO)]
    return [
        [*index, f"torch=={torch}"],
        [f"torch=={torch}", "--requirement", str(HERE / _REQUIREMENTS[0])],
        [*beside, "--requirement", str(HERE / _REQUIREMENTS[1])],
    ]


def pinned() -> str:
    """What the requirements files pin: transformers 5.23.0 and so on."""
    newest, with_ppo = (
        ", ".join(line.replace("==", " ") for line in (HERE / name).read_text().splitlines() if "==" in line)
        for name in _REQUIREMENTS
    )
    return f"{newest}, for PPO {with_ppo}"


def python_of(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "bin" / "python"


def check(folder: Path) -> None:
    """Exit with the remedy where the environment is missing."""
    if not os.access(python_of(folder), os.X_OK):
        raise SystemExit(f"{folder}: no peers are installed here; run `python -m benchmarks peers --peers {folder}`")
