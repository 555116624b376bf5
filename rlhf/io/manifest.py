"""The manifest of a folder, with the checksums of its files; it is written last and marks the folder as complete."""

import json
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.io.files import read_json, sha256

_NAME = "manifest.json"
_FORMAT = 1


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write a manifest with `facts` and the size and sha256 of every file in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _NAME)
    listed = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    text = json.dumps({"format": _FORMAT, **facts, "files": listed}, indent=2)
    (folder / _NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the manifest.

    Raises:
        UserError: the manifest is missing or of a newer format, or a file is missing, truncated or altered.
    """
    path = folder / _NAME
    if not path.exists():
        raise UserError(f"{path}: no such file; the folder is not complete")
    try:
        manifest = read_json(path)
        version = int(manifest["format"])
        listed = [(name, facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()]
        if not isinstance(manifest["format"], int):
            raise TypeError(f"format is {manifest['format']!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if version > _FORMAT:
        raise UserError(f"{path}: has format {version}, this version reads up to {_FORMAT}; upgrade rlhf")
    for name, size, digest in listed:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing, though {path} lists it; restore it or use another folder")
        if file.stat().st_size != size:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, expected {size}; the file is cut off or altered")
        if sha256(file) != digest:
            raise UserError(
                f"{file}: its content is not what was saved (sha256); restore it, or, if you changed it on purpose, "
                f"delete {path}"
            )
    return manifest


def check_replaceable(folder: Path) -> None:
    """Raise UserError unless `folder` does not exist or holds exactly the files that its manifest lists."""
    if not folder.exists():
        return
    listed = read_manifest(folder)["files"]
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _NAME and str(path.relative_to(folder)) not in listed:
            raise UserError(f"{path}: is not part of what was saved in {folder}, which would be replaced; move it away")


def has_manifest(folder: Path) -> bool:
    """Return whether the folder has a manifest, valid or not."""
    return (folder / _NAME).is_file()
