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
