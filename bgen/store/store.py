"""A store, opened for reading: where its parts lie, and how every byte of them is checked.

::

    store/
      manifest.json       what is in it, checksum of every file; written last
      genes.csv           gene ids in the store's order
      gaps/, counts/      zarr v3 uint8 [n_chunks, bytes]: a row is a chunk of whole cells (bgen/store/format/codec.py)
      rows/genes          zarr v3 uint [n_cells]: expressed genes, which is bytes of counts
      rows/gap_bytes      zarr v3 uint [n_cells]
      rows/overflow       zarr v3 uint [n_cells]: counts of 255 and more
      rows/first_cell     zarr v3 int64 [n_chunks + 1]: number of each chunk's first cell
      rows/split          zarr v3 uint [n_cells]: code of the split
      obs/<column>        zarr v3 int32 codes or numbers [n_cells]
      origin/source, row  zarr v3 int32, int64 [n_cells]: input file and row in it
      origin/name         zarr v3 uint8 [n_cells, width]: barcodes in UTF-8, padded with zeros
"""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import tensorstore as ts
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError, nearest
from bgen.genes.table import read_genes
from bgen.order.cells import Members, Order
from bgen.store.arena import Arena
from bgen.store.format.codec import PROFILES, locate_rows
from bgen.store.format.manifest import Column, Manifest, check_files, read_manifest
from bgen.store.format.shards import Stream, read_ahead

SHARD_CHUNKS = 256
ROWS_CHUNK = 65_536


def array_spec(path: Path, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the tensorstore spec of a zarr v3 array on this machine's file system."""
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return spec if metadata is None else {**spec, "metadata": metadata, "create": True}


def obs_path(column: str) -> str:
    """Return where a column of obs lies in the store; its name may hold any character."""
    return f"obs/{quote(column, safe='')}"


def stream_metadata(n_chunks: int, chunk_bytes: int, profile: str) -> dict[str, Any]:
    """Return the zarr v3 metadata of a byte stream: one row a chunk, shards of 256 chunks, a CRC-32C per chunk."""
    checked = [{"name": "bytes"}, *PROFILES[profile], {"name": "crc32c"}]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [1, chunk_bytes], "codecs": checked, "index_codecs": index}
    return {
        "shape": [n_chunks, chunk_bytes],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_CHUNKS, chunk_bytes]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0,
    }


def column_metadata(values: NDArray[Any]) -> dict[str, Any]:
    """Return the zarr v3 metadata of an array with one entry (or row) a cell."""
    return {
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS_CHUNK, *values.shape[1:]]}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}} if values.itemsize > 1 else {"name": "bytes"},
            {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
            {"name": "crc32c"},
        ],
        "fill_value": 0,
    }


class Store:
    """A store, opened for reading.

    Opening reads the manifest, compares the size of every file with it, and reads the few numbers per cell that say
    where it lies; counts are read when they are asked for.

    Parameters
    ----------
    folder
        The store.
    threads
        Threads that decode chunks.

    Raises
    ------
    UserError
        If there is no store, or files are missing or have another size than was written.
    """

    def __init__(self, folder: str | Path, *, threads: int = 2) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder)
        if problems := self._find_damage():
            listed = "\n  ".join(problems[:10])
            raise UserError(f"The store {self.folder} is damaged:\n  {listed}\nRestore these files or build it again.")
        self.nonzeros = self._read_array("rows/genes")
        self._gap_bytes = self._read_array("rows/gap_bytes")
        self._overflow = self._read_array("rows/overflow")
        self.first_cell: I64 = self._read_array("rows/first_cell")
        self._streams = self._open_streams()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bgen-decode")

    def __len__(self) -> int:
        return self.manifest.n_cells

    @functools.cached_property
    def genes(self) -> pd.DataFrame:
        """The gene table in the store's order (see :mod:`bgen.genes.table`)."""
        return read_genes(self.folder)

    @property
    def fingerprint(self) -> str:
        """What tells this store from every other one."""
        return self.manifest.fingerprint

    def column_name(self, name: str) -> str:
        """Return the column that ``name``, a column or a role, means.

        Raises
        ------
        UserError
            Naming the nearest one, if there is none.
        """
        column = self.manifest.roles.get(name, name)
        if column not in self.manifest.columns:
            choices = [*self.manifest.columns, *self.manifest.roles]
            raise UserError(f"The store {self.folder} has no column or role '{name}'.{nearest(name, choices)}")
        return column

    def column(self, name: str) -> tuple[Column, NDArray[Any]]:
        """Return what a column (or role) is and its values ``[n_cells]``: int32 codes (-1 = missing) or numbers."""
        column = self.column_name(name)
        return self.manifest.columns[column], self._read_array(obs_path(column))

    def cells_of_split(self, split: str) -> I64:
        """Return the numbers of the cells of a split, ascending."""
        if split not in self.manifest.splits:
            raise UserError(f"The store {self.folder} has no split '{split}'.{nearest(split, self.manifest.splits)}")
        code = list(self.manifest.splits).index(split)
        return np.flatnonzero(self._read_array("rows/split") == code)

    def order(self, split: str, *, batch: int, lanes: int, window: int, seed: int) -> Order:
        """Return the order of the cells of a split (see :class:`bgen.order.cells.Order`)."""
        cells = self.cells_of_split(split)
        if len(cells) == 0:
            raise UserError(f"The split '{split}' of {self.folder} holds no cells.")
        name = f"{self.fingerprint}/{split}"
        return Order(Members.of(cells, self.first_cell), batch, lanes, window, seed, name)

    def read_chunks(self, chunks: I64, arena: Arena, slots: I64) -> list[Future[None]]:
        """Start to read chunks into slots of an arena, one each."""
        pairs = list(zip(self._streams, (arena.gaps, arena.counts), strict=True))
        try:
            return read_ahead(self._pool, pairs, chunks, slots)
        except (ValueError, OSError) as error:
            raise self.damaged(error) from None

    def arena(self, slots: int) -> Arena:
        """Return room for so many chunks."""
        return Arena(slots, self.manifest.gap_bytes, self.manifest.count_bytes)

    def locate(self, cells: I64, chunks: I64, slots: I64) -> I64:
        """Return where cells lie in an arena with chunks in slots (see :func:`bgen.store.format.codec.locate_rows`)."""
        rooms = self.manifest.gap_bytes, self.manifest.count_bytes
        return locate_rows(
            cells, chunks, slots, self.first_cell, self.nonzeros, self._gap_bytes, self._overflow, *rooms
        )

    def damaged(self, error: Exception) -> UserError:
        """Turn an error of the read engine into a message that names the file."""
        return UserError(
            f"The store {self.folder} cannot be read: {error}\n`bgen data verify {self.folder}` checks every file."
        )

    def source_of(self, cells: I64) -> tuple[NDArray[np.int32], I64]:
        """Return the input file (its place in the manifest) and the row in it of each cell."""
        return self._read_array("origin/source")[cells], self._read_array("origin/row")[cells]

    def rows(self, name: str) -> NDArray[np.unsignedinteger[Any]]:
        """Return a number of every cell: "genes", "gap_bytes", "overflow", or "split", its split's code."""
        return self._read_array(f"rows/{name}")

    def names(self) -> NDArray[np.str_]:
        """Return the barcodes ``[n_cells]``."""
        raw = self._read_array("origin/name")
        return np.char.decode(np.ascontiguousarray(raw).view(f"S{raw.shape[1]}")[:, 0], "utf-8")

    def _find_damage(self) -> list[str]:
        """Describe the files that are not as they were written, as far as a quick look tells."""
        problems = check_files(self.folder, self.manifest, checksums=False)
        return problems or check_files(self.folder, self.manifest, checksums=True, below="rows/")

    def _open_streams(self) -> list[Stream]:
        """Return what reads the chunks of gaps and of counts."""
        return [Stream(self.folder / name, self.manifest.profile) for name in ("gaps", "counts")]

    def _read_array(self, name: str) -> NDArray[Any]:
        try:
            return ts.open(array_spec(self.folder / name), open=True, read=True).result().read().result()
        except ValueError as error:
            raise self.damaged(error) from None
