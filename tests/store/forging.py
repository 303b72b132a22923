"""Stores that somebody made to do harm: every checksum in them is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import tensorstore as ts

from bgen.store.format.columns import column_metadata
from bgen.store.format.manifest import Manifest, hash_folder
from bgen.store.store import array_spec


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda tree: None) -> None:
    """Change the manifest of a store and give all of its files the checksums that they have now."""
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"] = {name: file.model_dump() for name, file in hash_folder(folder).items()}
    change(tree)
    (folder / "manifest.json").write_text(json.dumps(resign(tree)))


def resign(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the fingerprint that it should have, whatever is wrong in it."""
    bare = Manifest.model_construct(**{**tree, "fingerprint": ""})
    text = bare.model_dump_json(exclude_unset=True, warnings=False)
    return {**tree, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def put_array(folder: Path, name: str, values: np.ndarray) -> None:
    """Write an array of a store over the one that is there."""
    spec = {**array_spec(folder / name, column_metadata(values)), "delete_existing": True}
    ts.open(spec).result().write(values).result()


def get_array(folder: Path, name: str) -> np.ndarray:
    return ts.open(array_spec(folder / name), open=True, read=True).result().read().result()


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def put_chunk(folder: Path, stream: str, change: Callable[[np.ndarray], bytes | np.ndarray]) -> None:
    """Write the first shard of a stream again with another first chunk, decoded, as ``change`` makes it."""
    path = folder / stream / "c/0/0"
    slots, room = json.loads((folder / stream / "zarr.json").read_text())["chunk_grid"]["configuration"]["chunk_shape"]
    data = path.read_bytes()
    index = np.frombuffer(data[-16 * slots - 4 : -4], "<i8").reshape(-1, 2).copy()
    body = bytearray(data[: -16 * slots - 4])
    first = np.frombuffer(numcodecs.Zstd().decode(data[index[0, 0] : index[0].sum() - 4]), np.uint8).copy()
    assert len(first) == room
    changed = numcodecs.Zstd().encode(np.frombuffer(bytes(change(first)), np.uint8))
    index[0] = len(body), len(changed) + 4
    body += changed + google_crc32c.value(changed).to_bytes(4, "little")
    put_shard(path, body, index)


def put_shard(path: Path, body: bytes | bytearray, index: np.ndarray) -> None:
    """Write a shard from its chunks and its index."""
    tail = index.astype("<i8").tobytes()
    path.write_bytes(bytes(body) + tail + google_crc32c.value(tail).to_bytes(4, "little"))
