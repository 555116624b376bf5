"""What a run records about the bits that it makes: versions, machine, command and digests."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

import rlhf
from rlhf.config import SFTConfig, SFTRun
from rlhf.io.output_folder import read_provenance
from rlhf.io.provenance import PROMISE, code_commit, describe_provenance, provenance_of


def facts(**changes):
    values = {"precision": "fp32", "threads": 1, "compiled": False, "digests": {"data": "d"}} | changes
    return provenance_of(torch.device("cpu"), **values)


def test_provenance_names_versions_machine_and_command():
    value = facts(threads=3)
    assert value["rlhf"] == rlhf.__version__
    assert value["torch"] == torch.__version__
    assert value["threads"] == 3
    assert value["device"] == "cpu"
    assert value["digests"] == {"data": "d"}
    assert torch.backends.cpu.get_cpu_capability() in value["processor"]
    assert value["command"]
    assert json.loads(json.dumps(value)) == value
    assert PROMISE in describe_provenance(value)
    assert "3 threads on" in describe_provenance(value)
    assert "1 thread on" in describe_provenance(facts())


def test_the_commit_is_that_of_the_codes_own_repository(tmp_path):
    (tmp_path / "rlhf").mkdir()
    assert code_commit(tmp_path / "rlhf") is None
    (tmp_path / "site").mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "rlhf" / "a.py").write_text("")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    code_commit.cache_clear()
    commit = code_commit(tmp_path / "rlhf")
    assert commit == subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    (tmp_path / "rlhf" / "a.py").write_text("changed")
    code_commit.cache_clear()
    assert code_commit(tmp_path / "rlhf") == f"{commit}-dirty"
    (tmp_path / "site" / "rlhf").mkdir()
    assert code_commit(tmp_path / "site" / "rlhf") is None, "a repository above, such as a user's, is not the code's"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = SFTRun(output_dir=folder / "out", threads=1, compile="off", sft=SFTConfig(max_steps=2))
    rlhf.train.run(config)
    return folder / "out"


def test_a_run_records_its_provenance_everywhere(short_run: Path):
    manifest = json.loads((short_run / "sft" / "manifest.json").read_text())
    start = json.loads((short_run / "logs" / "metrics.jsonl").read_text().splitlines()[0])
    recorded = manifest["provenance"]
    assert start["provenance"] == recorded == read_provenance(short_run / "config.yaml")["sft"]
    assert recorded["threads"] == 1
    assert recorded["compile"] is False
    assert recorded["digests"]["data"] == manifest["data"]
    assert start["settings"]["sft.max_steps"] == 2
    assert any(PROMISE in note for note in start["notes"])
    text = (short_run / "config.yaml").read_text()
    assert PROMISE in text
    assert yaml.safe_load(text)["sft"]["max_steps"] == 2


def test_a_resumed_run_keeps_the_other_stages_provenance(short_run: Path):
    path = short_run / "config.yaml"
    before = read_provenance(path)["sft"]
    assert read_provenance(path.with_name("none.yaml")) == {}
    config = SFTRun(output_dir=short_run, threads=1, compile="off", resume=True, sft=SFTConfig(max_steps=2))
    rlhf.train.run(config)
    assert read_provenance(path)["sft"]["digests"] == before["digests"]
