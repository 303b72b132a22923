"""One-dimensional zarr arrays that others wrote, version 2 or 3: their metadata, and whether all chunks are there.

A reader of zarr takes a missing chunk for zeros. In a sparse matrix that would silently give wrong counts, so missing
chunks are looked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bgen.errors import UserError


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a zarr array.

    Raises
    ------
    UserError
        If there is none, or it is damaged.
    """
    for name in ("zarr.json", ".zarray"):
        if (path / name).is_file():
            try:
                return json.loads((path / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path / name} is damaged ({error}).") from None
    raise UserError(f"{path}: there is no zarr array.")


def chunk_length(metadata: dict[str, Any]) -> int:
    """Return how many entries are decoded at once: those of a chunk, or of one within a shard."""
    if metadata["zarr_format"] == 2:
        return int(metadata["chunks"][0])
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            return int(codec["configuration"]["chunk_shape"][0])
    return _file_length(metadata)


def missing_files(path: Path) -> list[str]:
    """Return the chunk (or shard) files of an array that are not there."""
    metadata = read_metadata(path)
    if len(metadata["shape"]) != 1:
        return []
    before = ""
    if metadata["zarr_format"] == 3 and metadata["chunk_key_encoding"]["name"] == "default":
        before = "c" + metadata["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
    numbers = range(-(-metadata["shape"][0] // _file_length(metadata)))
    return [f"{before}{number}" for number in numbers if not (path / f"{before}{number}").is_file()]


def _file_length(metadata: dict[str, Any]) -> int:
    if metadata["zarr_format"] == 2:
        return int(metadata["chunks"][0])
    return int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])


def require_whole(group: Path) -> None:
    """Check that no part of a stored sparse matrix is missing.

    Raises
    ------
    UserError
        Naming the first file that is not there.
    """
    for name in ("indptr", "indices", "data"):
        if missing := missing_files(group / name):
            raise UserError(
                f"{group}: {len(missing)} file(s) of '{name}' are missing, the first is {missing[0]}. Copy it again."
            )
