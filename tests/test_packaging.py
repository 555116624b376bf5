"""What a user's machine gets: one import root, the programs, the presets."""

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    folders = {path.parent for path in (ROOT / "rlhf").rglob("__init__.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"rlhf.cli", "rlhf.configs"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


@pytest.mark.parametrize("name", PROJECT["project"]["scripts"])
def test_programs_are_installed_and_explain_themselves(name):
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == name]
    assert callable(entry.load())
    done = subprocess.run([Path(sys.executable).with_name(name), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {name}")


def test_presets_are_package_data():
    shipped = {path.name for path in resources.files("rlhf.configs").iterdir() if path.name.endswith(".yaml")}
    assert shipped == {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {"model_config.yaml", "distributed.yaml", "demo.yaml", "gpt2.yaml", "gpt2-xl.yaml"} <= shipped


@pytest.mark.slow
def test_the_wheel_has_one_import_root(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("rlhf-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"rlhf"}
    assert {"rlhf/py.typed", "rlhf/__init__.pyi", "rlhf/configs/demo.yaml", "rlhf/cli/train.py"} <= set(names)
    pages = {f"rlhf/monitor/page/{path.name}" for path in (ROOT / "rlhf" / "monitor" / "page").iterdir()}
    assert {"rlhf/monitor/page/index.html", "rlhf/monitor/page/uPlot.LICENSE"} <= pages <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


USER_FILE = """\
import rlhf
from rlhf.config import SFTConfig
from rlhf.cli.train import main

reveal_type(SFTConfig(max_steps=3).max_steps)
rlhf.gae(gama=1)
"""


def test_an_editable_installation_is_a_path_that_type_checkers_follow():
    """setuptools writes one where all packages lie below one folder, and else an import hook that only Python runs."""
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"": "."}
    for name in ("cli", "configs"):
        assert (ROOT / "rlhf" / name).is_symlink()
        assert (ROOT / "rlhf" / name).resolve() == ROOT / name


@pytest.mark.slow
def test_types_survive_an_editable_installation(tmp_path):
    """In a fresh environment, as the README makes one, without the dependencies, which take minutes."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", ROOT]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode and "setuptools" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("no package index is reachable for the build's setuptools")
    assert done.returncode == 0, done.stderr
    (tmp_path / "user.py").write_text(USER_FILE)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        python,
        "--cache-dir",
        tmp_path / "cache",
        "user.py",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path).stdout
    assert 'Revealed type is "int | None"' in out.replace("Union[int, None]", "int | None")
    assert 'did you mean "gamma"?' in out
    assert "import-not-found" not in out.replace("annotated_types", "")
