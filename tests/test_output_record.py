"""The record of what rlhf wrote to a folder, and what stays of a file that is replaced."""

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.io.files import write_bytes
from rlhf.io.output import check_output, is_ours, remove_output, write_output

RECORD = ".rlhf.json"
FOREIGN = {
    "text": lambda path: path.write_text("# the user's own\n"),
    "another program's": lambda path: path.write_text('{"files": ["a", "b"]}'),
    "link": lambda path: path.symlink_to("nowhere"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_record_stays_and_the_file_is_written(tmp_path, make):
    make(tmp_path / RECORD)
    before = (tmp_path / RECORD).lstat()
    write_output(tmp_path / "out", "first", "--output")
    assert (tmp_path / "out").read_text() == "first"
    assert (tmp_path / RECORD).lstat().st_ino == before.st_ino
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="is not what rlhf wrote there"):
        check_output(tmp_path / "out", "--output", overwrite=False)
    write_output(tmp_path / "out", "second", "--output", overwrite=True)


def test_a_record_that_another_user_owns_does_not_keep_the_file_from_being_written(tmp_path, monkeypatch):
    write_output(tmp_path / "theirs", "1")
    rename = Path.rename

    def refused(path, target):
        if Path(target).name == RECORD:  # as in /tmp, where everybody may write and nobody replace
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    write_output(tmp_path / "mine", "2")
    assert (tmp_path / "mine").read_text() == "2"
    assert is_ours(tmp_path / "theirs")
    assert not is_ours(tmp_path / "mine")


def test_programs_that_write_to_one_folder_together_lose_no_entry(tmp_path):
    paths = [tmp_path / f"out-{number}" for number in range(24)]
    threads = [threading.Thread(target=write_in_turn, args=(paths[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(is_ours, paths))
    assert len(json.loads((tmp_path / RECORD).read_text())["files"]) == len(paths)


def write_in_turn(paths: list[Path]) -> None:
    for path in paths:
        write_output(path, path.name)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_permissions_of_a_file_stay(tmp_path, mode):
    path = tmp_path / "out"
    write_output(path, "first")
    path.chmod(mode)
    write_output(path, "second")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_that_is_mounted_by_itself_is_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("before, and longer")
    node = path.stat().st_ino

    def busy(*_arguments):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "rename", busy)
    write_bytes(path, b"after")
    assert path.read_text() == "after"
    assert path.stat().st_ino == node
    assert list(tmp_path.iterdir()) == [path]


def test_removing_our_file_leaves_the_link_to_it(tmp_path):
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", "ours")
    remove_output(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "target").exists()
