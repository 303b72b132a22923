"""AnnData in zarr that is written a block of cells at a time, by any number of processes.

A chunk of an array belongs to one block of cells, so two processes never write one file. Zarr version 2, which every
version of anndata reads.

Axes: N cells, K columns of an array.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from bgen.files import sync_file

WIDE = 4_096
"""Bytes of a cell from which on an array is cut into chunks of one batch, not of one block."""


@dataclass(frozen=True)
class Room:
    """An array with an entry or row a cell: its width (None: an entry), its type, and the names of categories.

    Attributes
    ----------
    width
        K.
    dtype
        Of what is written; of categories it does not count.
    categories
        Names, of a column whose values are codes.
    """

    width: int | None
    dtype: Any = np.float32
    categories: list[str] | None = None


@dataclass(frozen=True)
class Folder:
    """The AnnData group.

    Attributes
    ----------
    path
        Its folder.
    n
        N.
    block, batch
        Cells that are done at once by one process, and cells of a forward pass.
    rooms
        What is written of each cell, by path such as "obsm/X_bgen".
    """

    path: Path
    n: int
    block: int
    batch: int
    rooms: Mapping[str, Room]

    def create(self, cells: Any, var: pd.DataFrame) -> None:
        """Make the folder: obs as ``cells`` write it, var, and room for everything else."""
        group = zarr.open_group(self.path, mode="a", zarr_format=2)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            anndata.io.write_elem(group, name, {})
        anndata.io.write_elem(group, "var", var)
        cells.write_frame(group, self.block)
        obs: Any = group["obs"]
        for where, room in self.rooms.items():
            parent, name = where.split("/")
            if parent == "obs":
                if name in obs:  # a column of the cells, of an earlier run
                    del obs[name]
                order = [column for column in obs.attrs["column-order"] if column != name]
                obs.attrs["column-order"] = [*order, name]
            if room.categories is not None:
                add_categories(group[parent], name, self.n, self.block, room.categories)
            else:
                shape = (self.n,) if room.width is None else (self.n, room.width)
                add_array(group[parent], name, shape, np.dtype(room.dtype), self._rows(room))

    def finish(self, uns: Mapping[str, Any]) -> None:
        """Write ``uns``, and what lets a reader open everything by one file."""
        group = zarr.open_group(self.path, mode="r+")
        anndata.io.write_elem(group, "uns", dict(uns))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the folder of the run, which is no part of the group
            zarr.consolidate_metadata(self.path, zarr_format=2)

    def is_wide(self, where: str) -> bool:
        """Whether an array is written batch by batch."""
        return self._rows(self.rooms[where]) == self.batch != self.block

    def _rows(self, room: Room) -> int:
        width = (room.width or 1) * np.dtype(room.dtype).itemsize
        return self.batch if width > WIDE else self.block


class Writer:
    """Writes into a :class:`Folder` that was made; each process has its own.

    Parameters
    ----------
    folder
        The folder.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the folder of the run, which is no part of the group
            items = zarr.open_group(folder.path, mode="r+").members(max_depth=None)
        arrays = {name: item for name, item in items if isinstance(item, zarr.Array) and item.shape[:1] == (folder.n,)}
        # a chunk of zeros is written like any other: one that is not there was not written
        self._arrays = {name: array.with_config({"write_empty_chunks": True}) for name, array in arrays.items()}
        self._written: set[str] = set()

    def write(self, where: str, first: int, values: NDArray[Any]) -> None:
        """Write values, or codes of categories, of the cells from ``first`` on: whole chunks, except at the end."""
        name = where if where in self._arrays else f"{where}/codes"
        self._written.add(name)
        array: Any = self._arrays[name]
        array[first : first + len(values)] = values.astype(array.dtype, copy=False)

    def sync(self, first: int, last: int) -> None:
        """Have on the disk what was written of the cells ``first:last``."""
        for name, array in self._arrays.items():
            rows = array.chunks[0]
            for chunk in range(first // rows, -(-last // rows)):
                path = self.folder.path / name / ".".join([str(chunk), *["0"] * (array.ndim - 1)])
                if name in self._written or path.exists():  # of what anndata wrote, chunks of one value need no file
                    sync_file(path)


def add_array(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> None:
    """Make room for numbers with an entry or row a cell, in chunks of so many cells."""
    _add(group, name, shape, dtype, rows, "array")


def add_strings(group: Any, name: str, n: int, rows: int) -> None:
    """Make room for a text of each cell."""
    _add(group, name, (n,), "string", rows, "string-array")


def _add(group: Any, name: str, shape: tuple[int, ...], dtype: Any, rows: int, encoding: str) -> None:
    array = group.create_array(name, shape=shape, dtype=dtype, chunks=(rows, *shape[1:]))
    array.attrs.update({"encoding-type": encoding, "encoding-version": "0.2.0"})


def add_categories(group: Any, name: str, n: int, rows: int, categories: list[str]) -> None:
    """Make room for a column of categories, whose codes are written later, in a zarr group of a frame."""
    column = group.create_group(name)
    column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
    kind = next(kind for kind in (np.int8, np.int16, np.int32) if len(categories) <= np.iinfo(kind).max)
    add_array(column, "codes", (n,), np.dtype(kind), rows)
    anndata.io.write_elem(column, "categories", np.array(categories, dtype=object))
