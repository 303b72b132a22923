"""``bgen data to-webdataset``: a store as tar shards of blocks of cells, which plain ``webdataset`` reads too.

::

    out/
      manifest.json, genes.csv, rows/, obs/, origin/   as in the store: same fingerprint, so same order and resume
      webdataset.json     names, sizes and checksums of the shards
      blocks.npy          int64 [n_chunks, 7]: shard; offset, bytes and CRC-32C of the gaps; the same of the counts
      shards/00000.tar    samples 000000000.gaps.zst, .counts.zst, .json

A sample is a chunk of the store, about 256 cells. Its two streams (bgen/store/format/codec.py), zstd-compressed, are
padded with zeros; its JSON says how many bytes of them belong to each cell, and holds the cells' names, splits and obs.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from bgen.errors import UserError
from bgen.progress import Count
from bgen.store.format.manifest import NAME, check_files, hash_file
from bgen.store.format.shards import compress
from bgen.store.store import Store
from bgen.store.webdataset_store import BLOCKS, INDEX, VERSION
from data_tools.building.partial import all_or_nothing

BLOCK = 512
"""Bytes that a tar file is made of."""

DESCRIBED = 1024
"""Chunks whose cells' names and columns are in memory at a time."""

"""Called with the cells done and the cells in all."""


def to_webdataset(store: Store, out: Path, *, blocks_per_shard: int = 256, progress: Count | None = None) -> int:
    """Write a store as WebDataset and return the number of shards.

    Parameters
    ----------
    out
        Folder; must not be there, or be empty.
    blocks_per_shard
        Chunks of the store in one tar file: 256 are about 90 MB.

    Raises
    ------
    UserError
        If ``out`` is not empty or cannot be written, the disk is full, or the store is damaged.
    """
    if blocks_per_shard < 1:
        raise UserError("A shard holds one block at least.")
    manifest = store.manifest
    if problems := check_files(store.folder, manifest, checksums=True, below="o"):  # obs and origin
        raise UserError(f"The store {store.folder} is damaged: {problems[0]}.")
    n_shards = -(-manifest.n_chunks // blocks_per_shard)
    with all_or_nothing(out) as partial:
        for name in manifest.files:
            if not name.startswith(("gaps/", "counts/")):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(store.folder / name, partial / name)
        shutil.copyfile(store.folder / NAME, partial / NAME)
        (partial / "shards").mkdir()
        writer = _Samples(store)
        blocks = np.zeros((manifest.n_chunks, 7), np.int64)
        for number in range(n_shards):
            first, last = number * blocks_per_shard, min((number + 1) * blocks_per_shard, manifest.n_chunks)
            blocks[first:last, 0] = number
            with tarfile.open(partial / f"shards/{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for chunk in range(first, last):
                    blocks[chunk, 1:] = writer.add(tar, chunk)
            if progress:
                progress(int(store.first_cell[last]), len(store))
        np.save(partial / BLOCKS, blocks)
        files = sorted((partial / "shards").iterdir())
        index = {
            "format": "bgen-webdataset",
            "version": VERSION,
            "store": manifest.fingerprint,
            "blocks": hash_file(partial / BLOCKS).model_dump(),
            "shards": {f"shards/{file.name}": hash_file(file).model_dump() for file in files},
        }
        text = json.dumps(index, indent=1)
        index["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return n_shards


class _Samples:
    """Writes chunks of a store as samples of a tar file."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._first, self._last = 0, 0

    def add(self, tar: tarfile.TarFile, chunk: int) -> list[int]:
        """Add a sample; return offset, bytes and CRC-32C of its gaps, then of its counts."""
        store = self.store
        arena = store.arena(1)
        for future in store.read_chunks(np.array([chunk]), arena, np.zeros(1, np.int64)):
            try:
                future.result()
            except (ValueError, OSError) as error:
                raise store.unread(error) from None
        found = []
        for name, row in (("gaps", arena.gaps[0]), ("counts", arena.counts[0])):
            packed = compress(row, "small")[:-4]
            found += [_add_member(tar, f"{chunk:09d}.{name}.zst", packed), len(packed), google_crc32c.value(packed)]
        _add_member(tar, f"{chunk:09d}.json", json.dumps(self._describe(chunk), allow_nan=False).encode())
        return found

    def _describe(self, chunk: int) -> dict[str, Any]:
        first, last = self.store.first_cell[[chunk, chunk + 1]].tolist()
        if last > self._last:
            self._read(first, int(self.store.first_cell[min(chunk + DESCRIBED, len(self.store.first_cell) - 1)]))
        cells = slice(first - self._first, last - self._first)
        obs: dict[str, list[Any]] = {}
        for name, (column, values) in self.columns.items():
            if column.kind == "category":
                obs[name] = [column.categories[code] if code >= 0 else None for code in values[cells].tolist()]
            else:
                obs[name] = [value if math.isfinite(value) else None for value in values[cells].tolist()]
        return {
            "first_cell": first,
            "cells": last - first,
            **{name: sizes[cells].tolist() for name, sizes in self.sizes.items()},
            "name": self.names[cells].tolist(),
            "split": self.splits[cells].tolist(),
            "obs": obs,
        }

    def _read(self, first: int, last: int) -> None:
        """Read what is said of the cells of some chunks."""
        self._first, self._last = first, last
        rows = first, last
        self.names = self.store.names(rows)
        self.sizes = {name: self.store.rows(name, rows) for name in ("genes", "gap_bytes", "overflow")}
        self.splits = np.array(list(self.store.manifest.splits), dtype=object)[self.store.rows("split", rows)]
        self.columns = {name: self.store.column(name, rows) for name in self.store.manifest.columns}


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file and return where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    start = tar.offset + BLOCK
    tar.addfile(info, io.BytesIO(data))
    return start
