"""Write a store: all or nothing (DESIGN, section 6)."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
import pandas as pd
import scipy.sparse as sp
import tensorstore as ts
from numpy.typing import NDArray

from bgen.config.errors import UserError
from bgen.data.codec import encode_chunk, stream_sizes
from bgen.data.genes import hash_genes, write_genes
from bgen.data.keys import hash_keys
from bgen.data.manifest import Column, Manifest, Source, hash_folder
from bgen.data.store import SHARD_CHUNKS, array_spec, column_metadata, obs_path, stream_metadata

CELLS_PER_CHUNK = 256
CELLS_AT_ONCE = 8192
CHUNKS_AT_ONCE = CELLS_AT_ONCE // CELLS_PER_CHUNK
MAX_CATEGORIES = 65_536

I64 = NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with the cells done and the cells in all."""


class CountRows(Protocol):
    """Counts ``[n_cells, n_genes]`` that can be read row by row: a CSR matrix, or what reads or draws one in pieces."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_cells, n_genes)."""

    def __getitem__(self, rows: I64, /) -> sp.csr_matrix:
        """Return rows as CSR of non-negative integers, none of them stored zeros."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What goes into a store.

    Attributes
    ----------
    counts
        ``[n_cells, n_genes]``; it is read three times, a few thousand rows at once.
    genes
        Columns id, symbol.
    obs
        Columns of any kind; the index holds the barcodes.
    split
        uint8 ``[n_cells]``: code of the split, a place in ``splits``.
    source, row
        ``[n_cells]``: input file (a place in ``sources``) and row in it.
    """

    counts: CountRows
    genes: pd.DataFrame
    obs: pd.DataFrame
    split: NDArray[np.uint8]
    splits: list[str]
    source: NDArray[np.int32]
    row: I64
    sources: list[Source]
    organism: str
    roles: Mapping[str, str]
    units: Mapping[str, str] = field(default_factory=dict)
    control: str | None = None
    split_by: str | None = None


def write_store(
    folder: Path, contents: Contents, *, profile: str, seed: int, created_by: str, progress: Progress | None = None
) -> Manifest:
    """Write a store and return its manifest.

    Cells are ordered by split, then by population, and shuffled within it, so that a population is one contiguous read;
    genes by how many cells express them. The files are written beside ``folder``, checked into a manifest and moved in
    place at the end: a store that was not finished is never there.

    Raises
    ------
    UserError
        If ``folder`` is there and not empty, or the disk is full.
    """
    with all_or_nothing(folder) as partial:
        expressed = _count_expressed(contents.counts)
        gene_order = np.argsort(-expressed, kind="stable")
        genes = contents.genes.iloc[gene_order].assign(cells=expressed[gene_order])
        cells = _order_cells(contents, seed)
        counts = _Arranged(contents.counts, cells, np.argsort(gene_order).astype(np.int32))
        nonzeros, gap_bytes, overflow = counts.sizes()
        gap_room, count_room = _room(gap_bytes), _room(nonzeros + 4 * overflow + 3)
        first_cell = _fill_chunks(nonzeros, gap_bytes, overflow, gap_room, count_room)
        _write_streams(partial, counts, first_cell, gap_room, count_room, profile, progress)

        write_array(partial / "rows/genes", _smallest(nonzeros))
        write_array(partial / "rows/gap_bytes", _smallest(gap_bytes))
        write_array(partial / "rows/overflow", _smallest(overflow))
        write_array(partial / "rows/first_cell", first_cell)
        write_array(partial / "rows/split", contents.split[cells])
        write_array(partial / "origin/source", contents.source[cells].astype(np.int32))
        write_array(partial / "origin/row", contents.row[cells].astype(np.int64))
        names = np.char.encode(contents.obs.index.to_numpy(dtype=str), "utf-8")[cells]
        write_array(partial / "origin/name", names.view(np.uint8).reshape(len(names), -1))
        columns, left_out = _write_obs(partial, contents.obs.iloc[cells])
        write_genes(genes, partial)

        manifest = Manifest(
            created_by=created_by,
            profile=profile,
            organism=contents.organism,
            n_cells=len(cells),
            n_genes=len(genes),
            n_nonzeros=int(nonzeros.sum()),
            n_chunks=len(first_cell) - 1,
            gap_bytes=gap_room,
            count_bytes=count_room,
            genes_sha256=hash_genes(genes["id"].tolist()),
            columns=columns,
            roles={role: column for role, column in contents.roles.items() if column in columns},
            left_out=left_out,
            units=dict(contents.units),
            control=contents.control,
            split_by=contents.split_by,
            splits={name: int((contents.split == code).sum()) for code, name in enumerate(contents.splits)},
            seed=seed,
            sources=contents.sources,
            files=hash_folder(partial),
        ).with_fingerprint()
        manifest.write(partial)
    return manifest


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """Give a folder to write in, which becomes ``folder`` if all goes well and vanishes if not.

    Raises
    ------
    UserError
        If ``folder`` is there and not empty, cannot be written, or the disk is full.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty. Choose another --out, or remove it first.")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, ValueError) as error:
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(folder.parent).free
        raise UserError(
            f"The disk of {folder.parent} is full: {free / 1e6:,.1f} MB were free and that was not enough."
            " Nothing was kept. Make room, or choose an --out on another disk."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array with one entry (or row) a cell."""
    ts.open(array_spec(path, column_metadata(values))).result().write(np.ascontiguousarray(values)).result()


@dataclass(frozen=True, eq=False)
class _Arranged:
    """Counts with cells and genes in the store's order, read in pieces."""

    counts: CountRows
    cells: I64  # number of each of the store's cells in ``counts``
    rank: NDArray[np.int32]  # number of each gene of ``counts`` in the store

    def block(self, start: int, stop: int) -> tuple[I64, NDArray[np.int32], NDArray[np.uint32]]:
        """Return the store's cells ``start:stop`` as indptr, ascending indices and counts."""
        rows = self.counts[self.cells[start:stop]]
        indptr = rows.indptr.astype(np.int64)
        return indptr, *_renumber(indptr, rows.indices, rows.data.astype(np.uint32, copy=False), self.rank)

    def sizes(self) -> tuple[I64, I64, I64]:
        """Return of each cell the expressed genes, the bytes of gaps and the entries of overflow."""
        parts = []
        for start in range(0, len(self.cells), CELLS_AT_ONCE):
            indptr, indices, counts = self.block(start, start + CELLS_AT_ONCE)
            parts.append(np.stack([np.diff(indptr), *stream_sizes(indptr, indices, counts)]))
        nonzeros, gap_bytes, overflow = np.concatenate(parts, axis=1)
        return nonzeros, gap_bytes, overflow


def _count_expressed(counts: CountRows) -> I64:
    """Return how many cells express each gene."""
    n_cells, n_genes = counts.shape
    expressed = np.zeros(n_genes, np.int64)
    for start in range(0, n_cells, CELLS_AT_ONCE):
        rows = counts[np.arange(start, min(start + CELLS_AT_ONCE, n_cells))]
        expressed += np.bincount(rows.indices, minlength=n_genes)
    return expressed


def _order_cells(contents: Contents, seed: int) -> I64:
    n_cells = contents.counts.shape[0]
    population = np.zeros(n_cells, np.int64)
    if "population" in contents.roles:
        population = pd.factorize(contents.obs[contents.roles["population"]], sort=True)[0].astype(np.int64)
    return np.lexsort((hash_keys(seed, np.arange(n_cells)), population, contents.split))


@numba.njit(cache=True, nogil=True)
def _renumber(
    indptr: I64, indices: NDArray[np.integer[Any]], counts: NDArray[np.uint32], rank: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """Return CSR indices and counts with gene ``g`` called ``rank[g]``, ascending within each row."""
    line = np.zeros(len(rank), np.uint32)  # one dense row is faster than sorting when a tenth of it is not zero
    new_indices = np.empty(len(indices), np.int32)
    new_counts = np.empty(len(indices), np.uint32)
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            line[rank[indices[k]]] = counts[k]
        at = indptr[row]
        for gene in range(len(line)):
            if line[gene]:
                new_indices[at] = gene
                new_counts[at] = line[gene]
                line[gene] = 0
                at += 1
    return new_indices, new_counts


def _room(sizes: I64) -> int:
    """Return the bytes of a chunk: enough for 256 usual cells, and for the largest one."""
    return max(int(np.ceil(sizes.mean() * CELLS_PER_CHUNK * 1.02)), int(sizes.max()), 4)


@numba.njit(cache=True)
def _fill_chunks(nonzeros: I64, gap_bytes: I64, overflow: I64, gap_room: int, count_room: int) -> I64:
    """Return int64 ``[n_chunks + 1]``: the first cell of each chunk, as many whole cells as fit."""
    first = [0]
    gaps = counts = spill = 0
    for cell in range(len(nonzeros)):
        gaps += gap_bytes[cell]
        counts += nonzeros[cell]
        spill += 4 * overflow[cell]
        if gaps > gap_room or -(-counts // 4) * 4 + spill > count_room:
            first.append(cell)
            gaps, counts, spill = gap_bytes[cell], nonzeros[cell], 4 * overflow[cell]
    first.append(len(nonzeros))
    return np.array(first, dtype=np.int64)


def _write_streams(
    folder: Path,
    counts: _Arranged,
    first_cell: I64,
    gap_room: int,
    count_room: int,
    profile: str,
    progress: Progress | None,
) -> None:
    n_chunks = len(first_cell) - 1
    arrays = [
        ts.open(array_spec(folder / name, stream_metadata(n_chunks, room, profile))).result()
        for name, room in (("gaps", gap_room), ("counts", count_room))
    ]
    for start in range(0, n_chunks, SHARD_CHUNKS):
        stop = min(start + SHARD_CHUNKS, n_chunks)
        shard = np.zeros((stop - start, gap_room), np.uint8), np.zeros((stop - start, count_room), np.uint8)
        for some in range(start, stop, CHUNKS_AT_ONCE):
            until = min(some + CHUNKS_AT_ONCE, stop)
            indptr, indices, values = counts.block(first_cell[some], first_cell[until])
            for chunk in range(some, until):
                low, high = first_cell[[chunk, chunk + 1]] - first_cell[some]
                rows = (stream[chunk - start] for stream in shard)
                encode_chunk(indptr[low : high + 1], indices, values, *rows)
        for write in [array[start:stop].write(block) for array, block in zip(arrays, shard, strict=True)]:
            write.result()
        if progress:
            progress(int(first_cell[stop]), int(first_cell[-1]))


def _write_obs(folder: Path, obs: pd.DataFrame) -> tuple[dict[str, Column], list[str]]:
    """Write the columns of obs; return what they are, and the names of those with too many distinct texts."""
    columns: dict[str, Column] = {}
    left_out = []
    for name in map(str, obs.columns):
        values = obs[name]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
            exact = np.array_equal(numbers.astype(np.float32).astype(np.float64), numbers, equal_nan=True)
            write_array(folder / obs_path(name), numbers.astype(np.float32) if exact else numbers)
            columns[name] = Column(kind="number")
            continue
        codes, categories = pd.factorize(values.astype("string"), sort=True)
        if len(categories) > MAX_CATEGORIES:
            left_out.append(name)
            continue
        write_array(folder / obs_path(name), codes.astype(np.int32))
        columns[name] = Column(kind="category", categories=[str(category) for category in categories])
    return columns, left_out


def _smallest(values: I64) -> NDArray[Any]:
    """Return non-negative integers in the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _sync(folder: Path) -> None:
    """Ask the system to put every file and folder on the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _disk_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
