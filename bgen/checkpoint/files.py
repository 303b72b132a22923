"""What a committed checkpoint looks like on disk, and how its files are checked.

::

    checkpoints/step_00000500/
        shard_00000.safetensors weights, optimiser, moving average, best weights: rank 0's share, and what is not split
        shard_00001.safetensors rank 1's share
        frozen.safetensors      frozen parameters, where there are any: one file that all checkpoints of the run link to
        state.json              step, early stopping, configuration, fingerprint of the data
        manifest.json           size and SHA-256 of each file above, number of ranks, versions
        COMMITTED               SHA-256 of manifest.json; written last: without it the folder is not a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

FORMAT = 3
READ = (2, 3)
"""Formats that can be read; 2 kept frozen parameters in rank 0's share."""

MANIFEST = "manifest.json"
MARKER = "COMMITTED"
STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"step_\d{8,}(\.tmp.*)?")


def folder_name(step: int) -> str:
    """Name of the checkpoint after ``step`` optimiser steps."""
    return f"step_{step:08d}"


def committed(root: Path) -> list[Path]:
    """The committed checkpoints below ``root``, newest first; says nothing about damage since."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / MARKER).is_file()]
    return sorted(found, key=step_of, reverse=True)


def unfinished(root: Path) -> list[Path]:
    """The folders below ``root`` that are no checkpoints: begun and not committed, or half deleted."""
    return [path for path in root.iterdir() if _UNFINISHED.fullmatch(path.name) and not (path / MARKER).is_file()]


def step_of(folder: Path) -> int:
    """Optimiser steps done at a checkpoint, from its name."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a small text file and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises
    ------
    ValueError
        If it is missing, damaged, or of another format.
    """
    try:
        marker = (folder / MARKER).read_text(encoding="utf-8").strip()
        if sha256(folder / MANIFEST) != marker:
            raise ValueError(f"{MANIFEST}: checksum differs")
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}") from error
    if manifest["format"] not in READ:
        raise ValueError(f"it has format {manifest['format']}, this bgen reads {', '.join(map(str, READ))}")
    return manifest


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a committed checkpoint, or None.

    Every file's size is checked, and the contents of each ``parts``-th file starting with number ``part``, so that
    ranks share the reading.
    """
    try:
        files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for number, (name, entry) in enumerate(sorted(files.items())):
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name}: {path.stat().st_size} bytes instead of {entry['bytes']}"
        if number % parts == part and sha256(path) != entry["sha256"]:
            return f"{name}: checksum differs"
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint, its marker first, so that a half-deleted one is not taken for whole."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
