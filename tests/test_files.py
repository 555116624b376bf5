"""Writing: in one step or not at all, whatever fails: an exception, a full disk, a kill, another run."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rlhf import random
from rlhf.data.dataset import load_dataset
from rlhf.data.demo_data import write_embedded
from rlhf.data.schema import PROMPTS
from rlhf.errors import UserError
from rlhf.io.checkpoint import Checkpoint, save_checkpoint
from rlhf.io.files import (
    atomic_folder,
    check_free_space,
    check_writable,
    clear_write_errors,
    lock_folder,
    sha256,
    write_bytes,
)
from rlhf.io.model_folder import LanguageModel, RewardModel, RewardStatistics, save_language_model, save_reward_model
from rlhf.io.run_log import RunLog
from rlhf.models import gpt2
from rlhf.models.gpt2_config import GPT2Config


def write_text(path: Path, text: str, flag: str = "--output-dir") -> None:
    write_bytes(path, text.encode(), flag)


def write_json(path: Path, value: object, flag: str = "--output-dir") -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", flag)


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1_234_567])
def test_sha256_is_the_digest(tmp_path, size):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_atomic_folder_takes_the_place_of_what_was_there(tmp_path):
    target = tmp_path / "a" / "b" / "target"
    for version in ("1", "2"):
        with atomic_folder(target) as temporary:
            assert temporary.parent == target.parent  # the same file system
            (temporary / version).write_text(version)
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(version)
            if version == "2":
                assert names_below(target) == ["1", "sub", "sub/file"]  # still there
        assert names_below(target) == [version, "sub", "sub/file"]
        assert (target / "sub" / "file").read_text() == version
        assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError("x"), UserError("x"), KeyboardInterrupt()], ids=repr)
def test_atomic_folder_leaves_everything_as_it_was_when_the_block_fails(tmp_path, error):
    target = tmp_path / "target"
    with atomic_folder(target) as temporary:
        (temporary / "old").write_text("old")
    for folder in (target, tmp_path / "new"):
        with pytest.raises(type(error)), atomic_folder(folder) as temporary:  # noqa: PT012 (fails half-way)
            (temporary / "half").write_text("half")
            raise error
    assert names_below(tmp_path) == ["target", "target/old"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002], ids=oct)
def test_what_is_written_follows_the_umask(tmp_path, mask):
    with umask(mask):
        write_text(tmp_path / "text", "x")
        write_json(tmp_path / "json", [1])
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("x")
    for name in ("text", "json", "folder/file"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_write_text_and_json_replace_in_one_step(tmp_path):
    path = tmp_path / "file"
    for text in ("first, and longer\n", "é𝄞\u2028\n", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    value = {"é": [1, 2.5, None, "\u2028"]}
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert "é" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("text", ["\ud800", None], ids=["surrogate", "no text"])
def test_write_text_that_fails_leaves_the_old_content(tmp_path, text):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises((UnicodeEncodeError, AttributeError)):
        write_text(path, text)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_text_into_a_missing_or_impossible_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); choose another --output-dir"):
        write_text(tmp_path / "file" / "x", "text")
    with pytest.raises(UserError, match="cannot be written"), atomic_folder(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize("flag", ["--output", "--cache-dir"])
def test_what_cannot_be_written_is_told_with_the_flag_to_change(tmp_path, flag):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot be written .*; choose another {flag}$"):
        check_writable(tmp_path / "file", flag)
    with pytest.raises(UserError, match=f"x: cannot be written .*; choose another {flag}$"):
        write_json(tmp_path / "file" / "x", 1, flag)
    with pytest.raises(UserError, match=f"no space left .*, or choose another {flag}$"), largest_file(1):
        write_text(tmp_path / "x", "text", flag)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder", "--output")
    assert names_below(tmp_path) == []

    def refuse(*_arguments, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); choose another --output$"):
        check_writable(tmp_path / "new" / "folder", "--output")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_clear_write_errors_says_that_space_is_missing(name):
    with (
        pytest.raises(UserError, match="some/file: no space left to write it; free some"),
        clear_write_errors(Path("some/file")),
    ):
        raise OSError(getattr(errno, name), "whatever")


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "EISDIR", "ENAMETOOLONG", "EIO"])
def test_clear_write_errors_says_that_a_path_cannot_be_written(name):
    with (
        pytest.raises(UserError, match=r"some/file: cannot be written \(whatever\)"),
        clear_write_errors(Path("some/file")),
    ):
        raise OSError(getattr(errno, name), "whatever")


@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), ValueError("x")], ids=repr)
def test_clear_write_errors_lets_other_errors_through(error):
    with pytest.raises(type(error)) as caught, clear_write_errors(Path("x")):
        raise error
    assert caught.value is error


def test_check_free_space_refuses_what_does_not_fit(tmp_path):
    check_free_space(tmp_path, 0)
    check_free_space(tmp_path / "not" / "yet", 1000)
    for folder in (tmp_path, tmp_path / "not" / "yet"):
        with pytest.raises(UserError, match=r"GB free, but .* take 1000000000\.00 GB; free some") as caught:
            check_free_space(folder, 10**18)
        assert str(caught.value).startswith(f"{folder}: ")
    assert os.listdir(tmp_path) == []


def test_check_free_space_of_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_free_space(Path("outputs"), 0)
    with pytest.raises(UserError, match="outputs: "):
        check_free_space(Path("outputs"), 10**18)


CONFIG = GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)


def _checkpoint(folder: Path, tokenizer) -> None:
    save_checkpoint(folder / "x", Checkpoint(2, {"w": torch.ones(50_000)}, {}), keep=1)


def _language_model(folder: Path, tokenizer) -> None:
    save_language_model(folder / "x", LanguageModel(gpt2.init(CONFIG, key=random.key(0)), CONFIG, tokenizer), facts={})


def _reward_model(folder: Path, tokenizer) -> None:
    params = {"trunk": gpt2.init(CONFIG, key=random.key(0)), "head": {"weight": torch.ones(1, 16)}}
    save_reward_model(folder / "x", RewardModel(params, CONFIG, tokenizer, RewardStatistics(0.0, 1.0, 0)), facts={})


def _tokenizer(folder: Path, tokenizer) -> None:
    with atomic_folder(folder / "x") as temporary:
        tokenizer.save(temporary)


def _dataset(folder: Path, tokenizer) -> None:
    load_dataset(folder.parent / "data.json", PROMPTS, tokenizer, folder / "x")


def _events(folder: Path, tokenizer) -> None:
    with contextlib.closing(RunLog(folder / "x", "sft")) as log:
        for step in range(1000):
            log.metrics(step, {str(place): 0.0 for place in range(100)})  # takes more bytes than in metrics.jsonl


def _log(folder: Path, tokenizer) -> None:
    with contextlib.closing(RunLog(folder / "x", "sft", tensorboard=False)) as log:
        for step in range(1000):
            log.samples(step, [{"prompt": "x" * 100}])


WRITERS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "text": (lambda folder, _: write_text(folder / "x", "x" * 100_000), (0, 50_000)),
    "JSON": (lambda folder, _: write_json(folder / "x", ["x"] * 100_000), (0, 50_000)),
    "example": (lambda folder, _: write_embedded(folder / "x", size=50), (0, 3000)),
    "checkpoint": (_checkpoint, (0, 1000, 100_000, 200_000)),
    "language model": (_language_model, (0, 1000, 10_000)),
    "reward model": (_reward_model, (0, 1000, 10_000)),
    "tokenizer": (_tokenizer, (0, 300, 5000)),
    "data set": (_dataset, (0, 1000, 40_000, 40_064)),  # 40,000 bytes of tokens; their .npy header needs 128 more
    "log": (_log, (0, 3000)),
    "event file": (_events, (0, 1, 50, 3000)),
}


@pytest.mark.parametrize(("writer", "size"), [(name, size) for name, (_, sizes) in WRITERS.items() for size in sizes])
def test_no_space_left_is_refused_and_leaves_nothing_half_written(tmp_path, tokenizer, writer, size):
    (tmp_path / "data.json").write_text(json.dumps([{"prompt": "zq" * 500}] * 20))
    folder = tmp_path / "output"
    folder.mkdir()
    with pytest.raises(UserError, match="no space left to write it; free some") as caught, largest_file(size):
        WRITERS[writer][0](folder, tokenizer)
    assert str(caught.value).startswith(str(folder))
    left = [name for name in names_below(folder) if (folder / name).is_file() and (folder / name).stat().st_size]
    left = [name for name in left if not (name.endswith(".jsonl") or "tfevents" in name)]  # whole by line or record
    assert left == []
    assert not any(name.rpartition("/")[2].startswith(".") for name in names_below(folder)), "a temporary is left"


@pytest.mark.parametrize("writer", sorted(WRITERS.keys() - {"example", "data set", "log", "event file"}))
def test_no_space_left_keeps_what_was_there(tmp_path, tokenizer, writer):
    WRITERS[writer][0](tmp_path, tokenizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="no space left"), largest_file(1000):
        WRITERS[writer][0](tmp_path, tokenizer)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Runs in a mount namespace of its own, so that the disk is gone with the process, whatever happens to it.
FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
import torch
from rlhf.errors import UserError
from rlhf.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from rlhf.io.files import check_free_space

disk = Path("disk")
disk.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "rlhf", disk], check=True)
messages = []
for step in (1, 2, 3, 4):
    try:
        save_checkpoint(disk, Checkpoint(step, {"w": torch.full((50_000,), float(step))}, {}), keep=9)
    except UserError as error:
        messages.append(str(error))
try:
    check_free_space(disk, 0)  # less than the margin is left
except UserError as error:
    messages.append(str(error))
print(*messages, sep="\\n")
print(sorted(os.listdir(disk)), load_checkpoint(disk).step)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full_is_refused(tmp_path):
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "rlhf", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    command = ["unshare", "--mount", sys.executable, "-c", FULL_DISK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    *messages, last = done.stdout.splitlines()
    assert last == "['step-000001', 'step-000002'] 2"
    assert len(messages) == 3
    assert all("no space left to write it; free some" in message for message in messages[:2])
    assert "GB free, but" in messages[2]


DEAD = 2**22 - 1  # no process has this number: Linux counts to 2**22 at most, and only on large machines


def test_what_a_killed_process_left_beside_a_target_is_cleared(tmp_path):
    for name in ("folder", "file"):
        (tmp_path / f".{name}.{DEAD}.tmp").mkdir()
        (tmp_path / f".{name}.{DEAD}.tmp" / "half").write_text("x")
    (tmp_path / f".file.{DEAD}.old").write_text("x")
    (tmp_path / "file").write_text("x")
    with atomic_folder(tmp_path / "folder"):
        pass
    write_text(tmp_path / "file", "y")
    assert names_below(tmp_path) == ["file", "folder"]


def test_what_a_killed_process_had_moved_aside_is_given_back(tmp_path):
    """Killed between its two renames, where the system cannot exchange folders in one: the old one must not be lost."""
    aside = tmp_path / f".folder.{DEAD}.old"
    aside.mkdir()
    (aside / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder"):
        raise ZeroDivisionError
    assert (tmp_path / "folder" / "file").read_text() == "old"


@pytest.mark.parametrize("name", ["folder", "run[1]", "a*"])
def test_nothing_else_beside_a_target_is_cleared(tmp_path, name):
    """A backup of the user's, another target's leftovers, and what a live process is writing."""
    beside = [
        f".{name}.20231123.bak",
        f".{name}.{DEAD}.tar",
        f".{name}.99999999999999999999.tmp.gz",
        f".{name}.old",
        f".{name}.x.{DEAD}.txt",
        f".{name}.{os.getppid()}.tmp",
        f"{name}.{DEAD}.tmp",
        f".other.{DEAD}.tmp",
    ]
    for path in beside:
        (tmp_path / path).write_text("keep")
    write_text(tmp_path / name, "x")
    assert sorted(names_below(tmp_path)) == sorted([*beside, name])


# Kills itself with SIGKILL just before the n-th system call that Python makes to change a file, for every n.
CRASH = """
import sys
from pathlib import Path
from killing import outlives
from rlhf.io.files import atomic_folder, write_bytes

def folder(content):
    with atomic_folder(Path("target")) as temporary:
        (temporary / "a").write_text(content)
        (temporary / "b").write_text(content)

def text(content):
    write_bytes(Path("target"), content.encode())

def read():
    if Path("target").is_dir():
        a, b = ((Path("target") / name).read_text() for name in ("a", "b"))
        return a if a == b else "mixed"
    return Path("target").read_text() if Path("target").exists() else "missing"

action = {"folder": folder, "text": text}[sys.argv[1]]
action("old")
for kill_at in range(1, 1000):
    if outlives(kill_at, lambda: action("new")):
        break
    print(kill_at, read())
    action("old")
print("points", kill_at - 1, read())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["folder", "text"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, "-c", CRASH, kind],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *points, last = done.stdout.splitlines()
    assert last.endswith("new")
    assert len(points) >= 3
    bad = [point for point in points if point.split()[1] not in ("old", "new")]
    assert bad == [], f"of {len(points)} moments"


HOLD = """
import sys, time
from pathlib import Path
from rlhf.io.files import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def held_by_another_process(folder: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_lock_folder_refuses_a_second_process_until_the_first_is_done(tmp_path):
    folder = tmp_path / "output"
    with held_by_another_process(folder) as process:
        with pytest.raises(
            UserError, match="in use by a live run; wait for it, or choose another --output-dir"
        ) as caught:
            lock_folder(folder).__enter__()
        assert str(caught.value).startswith(f"{folder}: ")
        assert folder.is_dir()  # it is the other's
        process.communicate("done\n")
        assert process.returncode == 0
    assert not folder.exists()
    with lock_folder(folder):
        assert folder.is_dir()


def test_lock_folder_is_free_after_a_kill(tmp_path):
    folder = tmp_path / "output"
    with held_by_another_process(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        begun = time.monotonic()
        with lock_folder(folder):
            assert time.monotonic() - begun < 5


def test_lock_folder_refuses_the_same_process_too(tmp_path):
    with lock_folder(tmp_path / "output"):
        with pytest.raises(UserError, match="in use by a live run"):
            lock_folder(tmp_path / "output").__enter__()
        with lock_folder(tmp_path / "another"):
            pass
    with lock_folder(tmp_path / "output"):
        pass


def test_lock_folder_removes_what_it_made_and_nothing_else(tmp_path):
    with lock_folder(tmp_path / "made"):
        assert (tmp_path / "made").is_dir()
    with lock_folder(tmp_path / "used"):
        (tmp_path / "used" / "file").write_text("x")
    assert names_below(tmp_path) == ["used", "used/file"]


def test_lock_folder_removes_what_it_made_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "made"):
        raise ZeroDivisionError
    assert names_below(tmp_path) == []


def test_lock_folder_keeps_an_empty_folder_that_was_there_before(tmp_path):
    (tmp_path / "mine").mkdir()
    with lock_folder(tmp_path / "mine"):
        pass
    assert names_below(tmp_path) == ["mine"]


def test_lock_folder_removes_the_parents_it_made(tmp_path):
    with lock_folder(tmp_path / "a" / "b" / "c"):
        pass
    assert names_below(tmp_path) == []


def test_lock_folder_refuses_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written") as caught:
            lock_folder(folder).__enter__()
        assert str(caught.value).startswith(f"{folder}: ")
    assert (tmp_path / "file").read_text() == "x"
