"""Checkpoints: everything comes back bit for bit, only whole ones count, and a crash costs no older one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.errors import UserError
from rlhf.io.checkpoint import Checkpoint, last_step, load_checkpoint, save_checkpoint
from rlhf.io.manifest import write_manifest


def state(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((100,), float(step)), "count": torch.tensor(step)}, {"step": step})


def assert_same(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert found.step == expected.step
    assert found.facts == expected.facts
    assert sorted(found.tensors) == sorted(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    buffer = torch.arange(24.0)
    tensors = {
        "params.h.0.weight": buffer[:12].view(3, 4),  # views of one buffer, as the executor has them
        "params.h.1.weight": buffer[12:].view(4, 3),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "strided": torch.arange(10, dtype=torch.float64)[::3],
        "bf16": torch.tensor([1.0, 3e38, -1e-38], dtype=torch.bfloat16),
        "tiny": torch.tensor([5e-324, 1 / 3], dtype=torch.float64),
        "key": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
        "count": torch.tensor(2**62),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "attached": torch.ones(2, requires_grad=True).detach().requires_grad_(),
    }
    facts = {
        "kl_coef": 0.1 + 0.2,
        "tiny": 5e-324,
        "text": "é𝄞\u2028",
        "nested": [1, None, True, {"a": []}],
        "big": 2**80,
    }
    checkpoint = Checkpoint(7, tensors, facts)
    assert save_checkpoint(tmp_path, checkpoint, keep=1) == tmp_path / "step-000007"
    found = load_checkpoint(tmp_path)
    assert_same(found, checkpoint)
    assert not any(tensor.requires_grad for tensor in found.tensors.values())


def test_special_floats_come_back(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    save_checkpoint(tmp_path, Checkpoint(1, {"x": values}, {}), keep=1)
    found = load_checkpoint(tmp_path).tensors["x"]
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


def test_saving_changes_nothing_that_is_saved(tmp_path):
    checkpoint = state(1)
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    save_checkpoint(tmp_path, checkpoint, keep=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.tensors.items())


def test_there_is_no_checkpoint_where_none_is_whole(tmp_path):
    assert load_checkpoint(tmp_path / "missing") is None
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "step-000009").mkdir()  # no manifest
    (tmp_path / "step-000009" / "state.safetensors").write_bytes(b"x")
    (tmp_path / "step-12").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "step-000004").write_text("a file")
    for name in (".step-000005.1.tmp", "step-000005.bak", "step-00001x"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, {"step": 5, "facts": {}})
    assert load_checkpoint(tmp_path) is None
    assert last_step(tmp_path) is None
    save_checkpoint(tmp_path, state(2), keep=1)
    assert_same(load_checkpoint(tmp_path), state(2))
    assert last_step(tmp_path) == 2


@pytest.mark.parametrize("keep", [1, 2, 3, 10])
def test_the_newest_are_kept(tmp_path, keep):
    steps = [1, 5, 9, 10, 100, 101]
    for done, step in enumerate(steps, start=1):
        save_checkpoint(tmp_path, state(step), keep=keep)
        expected = [f"step-{kept:06d}" for kept in steps[:done][-keep:]]
        assert sorted(os.listdir(tmp_path)) == expected
        assert_same(load_checkpoint(tmp_path), state(step))
        assert last_step(tmp_path) == step


def test_steps_are_ordered_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, state(step), keep=5)
    assert last_step(tmp_path) == 1_000_000
    assert_same(load_checkpoint(tmp_path), state(1_000_000))
    save_checkpoint(tmp_path, state(10_000_000), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-1000000", "step-10000000"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, state(3), keep=2)
    other = Checkpoint(3, {"other": torch.ones(1)}, {"again": True})
    save_checkpoint(tmp_path, other, keep=2)
    assert_same(load_checkpoint(tmp_path), other)
    assert os.listdir(tmp_path) == ["step-000003"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "bit flipped": _flip,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_refused_by_the_name_of_the_file(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step), keep=2)
    path = tmp_path / "step-000002" / "state.safetensors"
    DAMAGES[damage](path)
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert f"; remove {path.parent} to use an older one" in str(caught.value)
    for old in (tmp_path / "step-000002").iterdir():
        old.unlink()
    assert_same(load_checkpoint(tmp_path), state(1))  # the way out that a person has


@pytest.mark.parametrize(
    "content", ["", "{", "null", '{"format": 1, "files": {}}', '{"format": 1, "step": 2, "files": {}}']
)
def test_a_damaged_manifest_of_the_newest_checkpoint_is_refused(tmp_path, content):
    save_checkpoint(tmp_path, state(2), keep=2)
    path = tmp_path / "step-000002" / "manifest.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


FACTS = {"identity": {"data": "x"}, "carried": {"kl_coef": 0.5}, "version": 3}
LACKING = {
    "all": ({}, "identity"),
    "one": ({name: value for name, value in FACTS.items() if name != "version"}, "version"),
    "one below": (FACTS | {"carried": {}}, "kl_coef"),
    "a mapping": (FACTS | {"identity": "x"}, "identity"),
    "a number": (FACTS | {"version": None}, "version"),
    "facts": (None, "facts"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_checkpoint_that_lacks_a_fact_is_refused(tmp_path, lacking):
    like = {"identity": {}, "carried": {"kl_coef": 1.0}, "version": 0}
    save_checkpoint(tmp_path, state(2)._replace(facts=FACTS), keep=2)
    assert load_checkpoint(tmp_path, like).facts == FACTS
    facts, name = LACKING[lacking]
    save_checkpoint(tmp_path, state(3)._replace(facts=facts), keep=2)
    with pytest.raises(UserError, match=rf"manifest\.json: has no '{name}' .*; remove .*step-000003 to use an older"):
        load_checkpoint(tmp_path, like)


def test_a_checkpoint_that_is_whole_but_no_safetensors_is_refused(tmp_path):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "state.safetensors").write_bytes(b"pickle, for all we know")
    write_manifest(folder, {"step": 1, "facts": {}})
    with pytest.raises(
        UserError, match=r"state\.safetensors: cannot be read .*; remove .*step-000001 to use an older one"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002], ids=oct)
def test_a_checkpoint_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = save_checkpoint(tmp_path / "root", state(1), keep=1)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys(["state.safetensors", "manifest.json"], 0o666 & ~mask)


# First kills a process that saves a checkpoint just before the n-th system call that Python makes to change a file, for
# every n; then kills processes that save one checkpoint after the other at moments drawn from a fixed seed.
CRASH = """
import json, os, random, shutil, signal, time
from pathlib import Path
import torch
from killing import outlives
from rlhf.io.checkpoint import Checkpoint, last_step, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
root = Path("checkpoints")
report = {"systematic": [], "random": [], "leftovers": []}

def state(step, size):
    return Checkpoint(step, {"w": torch.full((size,), float(step))}, {"step": step})

def problem(size, allowed):
    try:
        found = load_checkpoint(root)
    except BaseException as error:
        return repr(error)
    if found is None:
        return "no checkpoint"
    if found.step not in allowed or found.facts != {"step": found.step}:
        return f"step {found.step}, facts {found.facts}"
    if not torch.equal(found.tensors["w"], torch.full((size,), float(found.step))):
        return "wrong numbers"
    return ""

def leftovers():
    return sorted(path.name for path in root.iterdir() if path.name != "step-000003")

for kill_at in range(1, 1000):
    shutil.rmtree(root, ignore_errors=True)
    for step in (1, 2):
        save_checkpoint(root, state(step, 1000), keep=2)
    if outlives(kill_at, lambda: save_checkpoint(root, state(3, 1000), keep=2)):
        break
    report["systematic"].append(problem(1000, (2, 3)))
    save_checkpoint(root, state(3, 1000), keep=1)  # what a resumed run does
    report["leftovers"].append(leftovers())

rng = random.Random(0)
shutil.rmtree(root, ignore_errors=True)
save_checkpoint(root, state(1, 300_000), keep=2)
for _ in range(8):
    before = last_step(root)
    pid = os.fork()
    if pid == 0:
        for step in range(before + 1, before + 10_000):
            save_checkpoint(root, state(step, 300_000), keep=2)
        os._exit(0)
    time.sleep(rng.uniform(0.002, 0.08))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    report["random"].append(problem(300_000, range(before, before + 10_000)))
report["saved"] = last_step(root)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> dict:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    done = subprocess.run(
        [sys.executable, "-c", CRASH],
        cwd=tmp_path_factory.mktemp("crashes"),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_every_moment_of_saving_leaves_a_whole_checkpoint(crashes):
    assert len(crashes["systematic"]) > 10
    assert set(crashes["systematic"]) == {""}


def test_kills_at_random_moments_leave_a_whole_checkpoint(crashes):
    assert len(crashes["random"]) >= 5
    assert crashes["saved"] > 1  # or nothing was ever being saved
    assert set(crashes["random"]) == {""}


def test_what_a_kill_left_half_written_or_half_removed_is_gone_when_the_run_goes_on(crashes):
    """Otherwise every crash costs the disk space of a checkpoint for good."""
    assert len(crashes["leftovers"]) > 10
    assert [names for names in crashes["leftovers"] if names] == []
