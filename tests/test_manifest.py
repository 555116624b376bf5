"""Checksums of a folder: written last, and every kind of damage found and named."""

import hashlib
import json
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.io.manifest import has_manifest, read_manifest, write_manifest

FACTS = {"step": 3, "nested": {"é": [1, None, 2.5]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "é 𝄞.txt").write_text("text")
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "file").write_text("below")
    write_manifest(tmp_path, FACTS)
    return tmp_path


def test_read_manifest_gives_the_facts_back(folder):
    manifest = read_manifest(folder)
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert has_manifest(folder)


def test_write_manifest_lists_every_file_with_size_and_digest(folder):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == 1  # a change of it makes older versions refuse the folder
    listed = manifest["files"]
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    files.pop("manifest.json")
    assert len(files) == 4
    assert listed == {
        name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, path in files.items()
    }


def test_write_manifest_again_lists_what_is_there_now(folder):
    (folder / "weights").write_text("other")
    (folder / "empty").unlink()
    write_manifest(folder, {})
    assert "step" not in read_manifest(folder)


def test_files_that_are_not_listed_do_not_matter(folder):
    (folder / "README.md").write_text("added later")
    assert read_manifest(folder)["step"] == 3


@pytest.mark.parametrize("name", ["weights", "é 𝄞.txt", "sub/deep/file"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"missing, though .* lists it; restore it") as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_a_file_cut_off_is_named_with_both_sizes(folder):
    path = folder / "weights"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="has 255999 bytes, expected 256000; the file is cut off or altered") as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("place", [0, 100_000, 255_999])
def test_one_flipped_bit_is_found(folder, place):
    path = folder / "weights"
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"its content is not what was saved \(sha256\); restore it") as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(folder / "manifest.json") in str(caught.value)  # the way out, for who changed it on purpose


def test_a_folder_instead_of_a_file_is_refused(folder):
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="missing"):
        read_manifest(folder)


def test_a_folder_without_manifest_is_not_complete(tmp_path):
    assert not has_manifest(tmp_path)
    assert not has_manifest(tmp_path / "missing")
    with pytest.raises(UserError, match=r"manifest\.json: no such file; the folder is not complete"):
        read_manifest(tmp_path)


def test_a_newer_format_is_refused_with_the_remedy(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": manifest["format"] + 1}))
    with pytest.raises(UserError, match=f"has format {manifest['format'] + 1}, .*; upgrade rlhf"):
        read_manifest(folder)


DAMAGED = {
    "empty": "",
    "cut off": '{"format": 1, "files": {"weights": {"bytes"',
    "not UTF-8": b'{"format": 1, "files": {}, "x": "\xff"}',
    "null": "null",
    "a list": "[]",
    "no files": '{"format": 1}',
    "no format": '{"files": {}}',
    "format is a text": '{"format": "1", "files": {}}',
    "format is null": '{"format": null, "files": {}}',
    "files are a list": '{"format": 1, "files": []}',
    "files are null": '{"format": 1, "files": null}',
    "a file without facts": '{"format": 1, "files": {"weights": null}}',
    "a file without size": '{"format": 1, "files": {"weights": {}}}',
    "a file without digest": '{"format": 1, "files": {"weights": {"bytes": 256000}}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_refused_by_name(folder, damage):
    content = DAMAGED[damage]
    path = folder / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_manifest(folder)
    assert str(caught.value).startswith(f"{path}: ")
