"""Training straight from AnnData in zarr, or a collection of it as annbatch writes it: CSR, zarr version 2 or 3.

A chunk is a fixed number of rows. It is read from the CSR arrays and encoded as a chunk of a store is
(:mod:`bgen.store.format.codec`), so everything after it is the same: order, resume, batches. Two things that a build
adds are missing: genes keep the file's order, and counts have no checksums except those of the array's own codecs.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorstore as ts
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.genes.table import hash_genes
from bgen.store.arena import Arena
from bgen.store.format.codec import ESCAPE, locate_rows
from bgen.store.format.columns import NAMED, encode_column, is_whole, whole_as_text
from bgen.store.format.manifest import Column, Manifest, Source
from bgen.store.format.recode import encode_rows
from bgen.store.format.sparse import read_pointer
from bgen.store.format.zarr_metadata import chunk_length, read_metadata, require_safe, require_whole
from bgen.store.format.zarr_texts import bounded_texts
from bgen.store.host import Fill
from bgen.store.splits import DEFAULT, assign, assign_groups, group_names, require_cells
from bgen.store.store import Store, code_type

ROWS = 256
"""Rows of a chunk; more where the file's own chunks are larger, since those are decoded whole."""

MOST_ROWS = 4096


class CsrPart:
    """One AnnData group.

    Parameters
    ----------
    path
        The group.
    matrix
        Path of the CSR matrix in it.
    context
        Thread and cache limits.

    Raises
    ------
    UserError
        If it is not AnnData with such a matrix, or files are missing.
    """

    def __init__(self, path: Path, matrix: str, context: ts.Context) -> None:
        import anndata  # takes a second, in every rank, and a store of bgen's does not need it
        import zarr

        self.path, self.matrix = path, path / matrix
        try:
            with warnings.catch_warnings(), bounded_texts():
                warnings.simplefilter("ignore")  # anndata's and zarr's remarks about files of older versions
                require_safe(path)
                group: Any = zarr.open_group(path, mode="r")
                attributes = dict(group[matrix].attrs)
                self.obs = anndata.io.read_elem(group["obs"])
                self.var = anndata.io.read_elem(group["var"])
        except UserError:
            raise
        except Exception as error:  # whatever the libraries say of a damaged file
            raise UserError(f"{path} cannot be read as AnnData in zarr with a matrix {matrix} ({error}).") from None
        if attributes.get("encoding-type") != "csr_matrix":
            raise UserError(
                f"{path}: {matrix} is a {attributes.get('encoding-type', 'dense array')}, and only CSR can be read by"
                " rows. `bgen data build` makes a store of it."
            )
        require_whole(self.matrix)
        if (rows := group[matrix]["indptr"].shape[0] - 1) != len(self.obs):
            raise UserError(f"{path}: {matrix} has {rows} rows and obs {len(self.obs)}.")
        try:
            self.indptr: I64 = read_pointer(group[matrix], len(self.obs))
            if int(np.diff(self.indptr).max()) > 2 * len(self.var):
                raise ValueError(f"a row of it has more values than there are genes, {len(self.var):,}")
        except Exception as error:  # whatever the libraries say of a damaged file
            raise UserError(f"{path}: {matrix} cannot be read ({error}). Is it damaged?") from None
        self.metadata = {name: read_metadata(self.matrix / name) for name in ("data", "indices")}
        self._arrays = {}
        for name, about in self.metadata.items():
            driver = "zarr" if about["zarr_format"] == 2 else "zarr3"
            spec: dict[str, Any] = {"driver": driver, "kvstore": {"driver": "file", "path": str(self.matrix / name)}}
            spec["fill_missing_data_reads"] = False  # a chunk that vanishes is not zeros
            try:
                self._arrays[name] = ts.open(spec, context=context, open=True, read=True).result()
            except ValueError as error:
                raise UserError(
                    f"{self.matrix / name} cannot be opened: {error}. `bgen data build` can make a store of it."
                ) from None

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return indices and values of rows ``start:stop``."""
        part = slice(int(self.indptr[start]), int(self.indptr[stop]))
        futures = [self._arrays[name][part].read() for name in ("indices", "data")]
        indices, values = (np.asarray(future.result()) for future in futures)
        return indices, values


class CsrStore(Store):
    """AnnData in zarr as a store (see :class:`bgen.store.store.Store`).

    Parameters
    ----------
    folder
        An AnnData group, or a group of them with the same genes.
    matrix
        Where the counts are: "X", "layers/counts", ...
    roles
        Role to column: cell_type, batch, time, ...
    splits, split_by, held_out
        As for ``bgen data build``: fractions, the column or role whose values are kept together, and values by name.
    control
        The perturbation that means "none".
    seed
        Of the splits.
    threads
        Threads that read and decode.

    Raises
    ------
    UserError
        If the files are not such AnnData, or do not fit together.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        matrix: str = "X",
        roles: Mapping[str, str] | None = None,
        splits: Mapping[str, float] | None = None,
        split_by: str | None = None,
        held_out: Mapping[str, Sequence[str]] | None = None,
        control: str | None = None,
        seed: int = 0,
        threads: int = 2,
    ) -> None:
        self.folder = Path(folder)
        context = ts.Context(
            {"cache_pool": {"total_bytes_limit": 64 << 20}, "data_copy_concurrency": {"limit": threads}}
        )
        self._parts = [CsrPart(path, matrix, context) for path in members(self.folder)]
        ids = [str(gene) for gene in self._parts[0].var.index]
        for part in self._parts[1:]:
            if [str(gene) for gene in part.var.index] != ids:
                raise UserError(
                    f"{part.path} does not have the genes of {self._parts[0].path} in their order. `bgen data build`"
                    " unites the genes of several files."
                )
        lengths = [len(part.obs) for part in self._parts]
        self._first_rows = np.concatenate([[0], np.cumsum(lengths)])
        self.nonzeros = np.concatenate([np.diff(part.indptr).astype(np.uint32) for part in self._parts])
        self._gap_bytes = np.zeros(len(self.nonzeros), np.uint32)  # known of chunks that have been read
        self._overflow = np.zeros(len(self.nonzeros), np.uint32)
        self.first_cell = self._cut()
        obs = pd.concat([part.obs for part in self._parts]) if len(self._parts) > 1 else self._parts[0].obs
        self._names = obs.index.to_numpy(dtype=str)
        self._columns: dict[str, tuple[Column, NDArray[Any]]] = {}
        roles = dict(roles or {})
        named = {column for role, column in roles.items() if role in NAMED}
        for name in map(str, obs.columns):
            is_name = name in named and is_whole(obs[name])
            if (encoded := encode_column(whole_as_text(obs[name]) if is_name else obs[name])) is not None:
                self._columns[name] = encoded
        for role, name in roles.items():
            if name not in self._columns:
                raise UserError(f"{self.folder} has no column '{name}' for the role {role}.")
        splits = dict(splits or DEFAULT)
        if split_by is None:
            self._split = assign(splits, None, len(obs), seed)
        else:
            split_by = roles.get(split_by, split_by)
            if split_by not in obs:
                raise UserError(f"{self.folder} has no column or role '{split_by}' to split by.")
            spread = control if split_by == roles.get("perturbation") else None
            groups = group_names(obs[split_by])
            self._split = assign_groups(splits, groups, seed, held_out=held_out or {}, spread=spread)
        require_cells(splits, self._split)
        symbols = self._parts[0].var.get("symbol", pd.Series(ids))
        self._genes = pd.DataFrame({"id": ids, "symbol": symbols.astype(str).to_numpy(), "cells": -1})
        largest = int(np.add.reduceat(self.nonzeros, self.first_cell[:-1], dtype=np.int64).max())
        self.manifest = Manifest(
            created_by="AnnData",
            profile="small",
            organism="unknown",
            n_cells=len(obs),
            n_genes=len(ids),
            n_nonzeros=int(self.nonzeros.sum(dtype=np.int64)),
            n_chunks=len(self.first_cell) - 1,
            # enough for any counts; memory that is never written takes no room
            gap_bytes=largest + int(np.diff(self.first_cell).max()) * (len(ids) // ESCAPE + 1),
            count_bytes=5 * largest + 4,
            genes_sha256=hash_genes(ids),
            columns={name: column for name, (column, _) in self._columns.items()},
            roles=roles,
            control=control,
            split_by=split_by,
            held_out={name: list(values) for name, values in (held_out or {}).items()},
            splits={name: int((self._split == code).sum()) for code, name in enumerate(splits)},
            seed=seed,
            sources=[
                Source(name=part.path.name, bytes=0, cells=len(part.obs), kept=len(part.obs), matrix=matrix)
                for part in self._parts
            ],
            files={},
            vocabulary=self._digest(),
        ).with_fingerprint()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bgen-decode")
        self._started = threading.local()  # what this thread last started to read: chunk to future

    @property
    def genes(self) -> pd.DataFrame:
        """The gene table; how many cells express a gene is not known (-1)."""
        return self._genes

    def column(
        self, name: str, rows: tuple[int, int] | None = None, *, cells: I64 | None = None
    ) -> tuple[Column, NDArray[Any]]:
        """See :class:`bgen.store.store.Store`."""
        about, values = self._columns[self.column_name(name)]
        values = values if rows is None else values[slice(*rows)]
        return about, values if cells is None else values[cells]

    def rows(self, name: str, rows: tuple[int, int] | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """See :class:`bgen.store.store.Store`; only "split" is known without reading the counts."""
        assert name == "split", name
        return self._split if rows is None else self._split[slice(*rows)]

    def shuffled_within(self) -> None:
        """See :class:`bgen.store.store.Store`: files keep the order that they have."""
        return None

    @property
    def _is_shuffled(self) -> bool:
        return False

    def source_of(self, cells: I64) -> tuple[NDArray[np.int32], I64]:
        """See :class:`bgen.store.store.Store`."""
        part = np.searchsorted(self._first_rows, cells, side="right") - 1
        return part.astype(np.int32), cells - self._first_rows[part]

    def origin(self, start: int, stop: int) -> tuple[NDArray[np.int32], I64]:
        """See :class:`bgen.store.store.Store`."""
        return self.source_of(np.arange(start, stop))

    def sources(self) -> NDArray[np.signedinteger[Any]]:
        """See :class:`bgen.store.store.Store`."""
        return np.repeat(np.arange(len(self._parts), dtype=code_type(len(self._parts))), np.diff(self._first_rows))

    def share(self, what: str, n: int, kind: np.dtype[Any], fill: Fill) -> NDArray[Any]:
        """See :class:`bgen.store.store.Store`; not shared, as the fingerprint says nothing of the columns' values."""
        values = np.empty(n, kind)
        fill(values)
        return values

    def names(self, rows: tuple[int, int] | None = None, *, cells: I64 | None = None) -> NDArray[np.str_]:
        """See :class:`bgen.store.store.Store`."""
        found = self._names if rows is None else self._names[slice(*rows)]
        return found if cells is None else found[cells]

    def read_chunks(self, chunks: I64, arena: Arena, slots: I64) -> list[Future[None]]:
        """See :class:`bgen.store.store.Store`."""
        futures = [
            self._pool.submit(self._read, chunk, arena, slot)
            for chunk, slot in zip(chunks.tolist(), slots.tolist(), strict=True)
        ]
        self._started.futures = dict(zip(chunks.tolist(), futures, strict=True))
        return futures

    def locate(self, cells: I64, chunks: I64, slots: I64) -> I64:
        """See :class:`bgen.store.store.Store`; the result waits for the chunks when it is read."""
        return LateRows(self, cells, chunks, slots, self._started.futures)  # type: ignore[return-value]

    def find(self, cells: I64, chunks: I64, slots: I64) -> I64:
        """Return where cells of chunks that have been read lie (see :func:`bgen.store.format.codec.locate_rows`)."""
        rooms = self.manifest.gap_bytes, self.manifest.count_bytes
        return locate_rows(
            cells, chunks, slots, self.first_cell, self.nonzeros, self._gap_bytes, self._overflow, *rooms
        )

    def damaged(self, error: Exception) -> UserError:
        """See :class:`bgen.store.store.Store`."""
        return UserError(f"{self._where} cannot be read: {error}")

    def _read(self, chunk: int, arena: Arena, slot: int) -> None:
        """Read and encode a chunk.

        Raises
        ------
        ValueError
            If its arrays are damaged, or its values no counts.
        """
        first, last = self.first_cell[[chunk, chunk + 1]].tolist()
        number = int(np.searchsorted(self._first_rows, first, side="right")) - 1
        part, offset = self._parts[number], int(self._first_rows[number])
        indices, values = part.read(first - offset, last - offset)
        counts = values.astype(np.uint32)
        if not np.array_equal(counts, values):
            raise ValueError(
                f"{part.matrix} holds values that are no counts, in rows {first - offset} to {last - offset}"
            )
        n_genes, n_cells = self.manifest.n_genes, last - first
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_genes:
            raise ValueError(
                f"{part.matrix}: gene numbers are out of range in rows {first - offset} to {last - offset}"
            )
        indptr = part.indptr[first - offset : last - offset + 1] - part.indptr[first - offset]
        overflow, sizes = np.empty(len(values), np.uint32), np.zeros((n_cells, 3), np.int64)
        bad = encode_rows(
            indptr,
            indices,
            counts,
            np.arange(n_genes),
            np.ones(n_cells, bool),
            np.zeros(n_genes, np.int64),
            arena.gaps[slot],
            arena.counts[slot],
            overflow,
            sizes,
        )
        if bad >= 0:
            raise ValueError(
                f"{part.matrix}: the counts of a gene in row {first - offset + bad} add up to 2^32 or more"
            )
        n_counts, n_overflow = int(sizes[:, 1].sum()), int(sizes[:, 2].sum())
        tail = -(-n_counts // 4) * 4
        arena.counts[slot, tail : tail + 4 * n_overflow] = overflow[:n_overflow].view(np.uint8)
        self._gap_bytes[first:last], self.nonzeros[first:last], self._overflow[first:last] = sizes.T

    def _cut(self) -> I64:
        """Return the first row of each chunk: chunks do not go beyond a part."""
        edges = []
        for part, first in zip(self._parts, self._first_rows, strict=False):
            together = max(chunk_length(about) for about in part.metadata.values())
            per_row = max(1.0, len(part.indptr) and part.indptr[-1] / max(1, len(part.indptr) - 1))
            step = int(min(max(ROWS, together / per_row), MOST_ROWS))
            edges.append(first + np.arange(0, len(part.obs), step))
        return np.concatenate([*edges, self._first_rows[-1:]]).astype(np.int64)

    def _digest(self) -> str:
        """Return a hash of what tells these files from others, but for the counts themselves."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(json.dumps(part.metadata, sort_keys=True).encode())
            digest.update(part.indptr.tobytes())
        digest.update("\n".join(self._names).encode())
        digest.update(self._split.tobytes())
        return digest.hexdigest()


class LateRows:
    """Where cells lie in an arena, found when it is asked for, once their chunks have been read and encoded.

    Parameters
    ----------
    store
        The store.
    cells, chunks, slots
        As for :meth:`bgen.store.store.Store.locate`.
    futures
        Chunk to its reading.
    """

    def __init__(
        self, store: CsrStore, cells: I64, chunks: I64, slots: I64, futures: Mapping[int, Future[None]]
    ) -> None:
        self._store, self._cells, self._chunks, self._slots, self._futures = store, cells, chunks, slots, futures
        self._chunk_of = np.searchsorted(store.first_cell, cells, side="right") - 1

    def __getitem__(self, key: Any) -> I64:
        """Return rows of int64 ``[R, 6]``, as a NumPy array would.

        Raises
        ------
        UserError
            If a chunk that they are in cannot be read.
        """
        which, *column = key if isinstance(key, tuple) else (key,)
        needed = np.unique(self._chunk_of[which])
        for chunk in needed.tolist():
            try:
                self._futures[chunk].result()
            except (ValueError, OSError) as error:
                raise self._store.unread(error) from None
        slots = self._slots[[int(np.flatnonzero(self._chunks == chunk)[0]) for chunk in needed]]
        rows = self._store.find(self._cells[which], needed, slots)
        return rows[(slice(None), *column)] if column else rows


def members(path: Path) -> list[Path]:
    """Return the AnnData groups of a collection, in the order of their numbers; or the group itself."""

    def is_group(folder: Path) -> bool:
        return (folder / "zarr.json").is_file() or (folder / ".zgroup").is_file()

    if not path.is_dir() or is_group(path / "obs"):
        return [path]
    found = [child for child in path.iterdir() if is_group(child / "obs")]
    return sorted(found, key=lambda child: (len(child.name), child.name)) or [path]
