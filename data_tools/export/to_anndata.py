"""``bgen data to-anndata``: a store, or a split of one, as .h5ad or AnnData in zarr, a few thousand cells at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.files import require_local, slashes_in_names, whole
from bgen.names import index_name
from bgen.progress import Count
from bgen.store.format.codec import find_bad_row, unpack_rows
from bgen.store.format.recode import gather
from bgen.store.store import Store

CHUNKS_AT_ONCE = 32
VALUES_PER_CHUNK = 1 << 18
"""Values in a chunk of the written arrays."""

EXACT = 1 << 24
"""Integers up to here are exact in float32."""

"""Called with the cells done and the cells in all."""


def to_anndata(
    store: Store, out: Path, *, split: str | None = None, dtype: str = "float32", progress: Count | None = None
) -> int:
    """Write the cells of a store, in its order, as AnnData and return how many they are.

    X holds the counts as CSR; obs the barcodes, every column and the split; var the gene table; uns the organism and
    the units. So ``bgen data build`` makes the same store of it again, except for the order of the cells.

    Parameters
    ----------
    out
        A new file .h5ad, or a new folder .zarr; it appears when it is complete.
    split
        Only the cells of this split.
    dtype
        Of the counts: float32, which most tools expect, or uint32.

    Raises
    ------
    UserError
        If ``out`` is there or has another ending, a column's name cannot be written, a count is not exact in float32,
        or the store is damaged.
    """
    require_local(out)
    if out.suffix not in (".h5ad", ".zarr"):
        raise UserError(f"--out {out}: end it in .h5ad or .zarr.")
    if out.exists():
        raise UserError(f"{out} is there already. Choose another --out, or remove it first.")
    if dtype not in ("float32", "uint32"):
        raise UserError(f"The counts are float32 or uint32, not '{dtype}'.")
    if out.suffix == ".zarr" and (slashed := [name for name in store.manifest.columns if "/" in name]):
        raise UserError(f"AnnData in zarr cannot hold obs columns with a '/' in their name ({slashed[0]}): use .h5ad.")
    cells = np.arange(len(store)) if split is None else store.cells_of_split(split)
    bare = _annotation(store, cells)
    try:
        with whole(out, replace=False) as half:
            if out.suffix == ".h5ad":
                with slashes_in_names():
                    bare.write_h5ad(half)
                with h5py.File(half, "a") as file:
                    _write_counts(file, store, cells, np.dtype(dtype), progress)
            else:
                group = zarr.open_group(half, mode="w", zarr_format=2)  # every version of anndata reads it
                anndata.io.write_elem(group, "/", bare)
                _write_counts(group, store, cells, np.dtype(dtype), progress)
                zarr.consolidate_metadata(half)
    except OSError as error:
        raise error if isinstance(error, UserError) else UserError(f"{out} cannot be written ({error}).") from None
    return len(cells)


def _annotation(store: Store, cells: I64) -> anndata.AnnData:
    """Return everything but the counts."""
    manifest = store.manifest
    obs = pd.DataFrame(index=pd.Index(store.names(cells=cells), name=index_name("cell", manifest.columns)))
    for name in manifest.columns:
        column, values = store.column(name)
        picked = values[cells]
        if column.kind == "number":
            obs[name] = picked
        else:
            obs[name] = pd.Categorical.from_codes(picked.astype(np.int32), column.categories)  # type: ignore[call-overload]
    codes = np.zeros(len(store), np.int32)
    for code, name in enumerate(manifest.splits):
        codes[store.cells_of_split(name)] = code
    if "split" not in obs:
        obs["split"] = pd.Categorical.from_codes(codes[cells], list(manifest.splits))  # type: ignore[call-overload]
    uns: dict[str, Any] = {"organism": manifest.organism}
    uns |= {f"{role}_unit": unit for role, unit in manifest.units.items()}
    uns["bgen"] = {"store": store.fingerprint, "roles": dict(manifest.roles)}
    var = store.genes.set_index("id").rename_axis("gene")
    return anndata.AnnData(obs=obs, var=var, uns=uns)


def _write_counts(group: Any, store: Store, cells: I64, dtype: np.dtype, progress: Count | None) -> None:
    """Write the counts of ascending ``cells`` as X into an open HDF5 file or zarr group."""
    if "X" in group:
        del group["X"]
    target = group.create_group("X")
    shape = [len(cells), store.manifest.n_genes]
    target.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    indptr = np.zeros(len(cells) + 1, np.int64)
    np.cumsum(store.nonzeros[cells], out=indptr[1:])
    total = int(indptr[-1])
    make = target.create_dataset if isinstance(group, h5py.Group) else target.create_array
    options: dict[str, Any] = {"chunks": (min(VALUES_PER_CHUNK, max(total, 1)),)}
    if isinstance(group, h5py.Group):
        options["compression"] = "lzf"
    arrays = {
        name: make(name, shape=(total,), dtype=kind, **options)
        for name, kind in (("data", dtype), ("indices", np.int32))
    }
    pointer = make("indptr", shape=indptr.shape, dtype=np.int64)
    pointer[:] = indptr
    done = 0
    for indices, counts in _read(store, cells, dtype):
        end = done + len(indices)
        arrays["indices"][done:end], arrays["data"][done:end] = indices, counts
        done = end
        if progress:
            progress(int(np.searchsorted(indptr, done, side="right")) - 1, len(cells))


def _read(store: Store, cells: I64, dtype: np.dtype) -> Iterator[tuple[NDArray[np.int32], NDArray[Any]]]:
    """Yield gene numbers and counts of ascending cells, some chunks at a time."""
    at = np.searchsorted(store.first_cell, cells, side="right") - 1
    chunks = np.unique(at)
    for some in range(0, len(chunks), CHUNKS_AT_ONCE):
        part = chunks[some : some + CHUNKS_AT_ONCE]
        slots, arena = np.arange(len(part)), store.arena(len(part))
        futures = store.read_chunks(part, arena, slots)
        wanted = cells[np.searchsorted(at, part[0]) : np.searchsorted(at, part[-1], side="right")]
        located = store.locate(wanted, part, slots)
        try:
            for future in futures:
                future.result()
        except (ValueError, OSError) as error:
            raise store.unread(error) from None
        rows = located[:]  # known once the chunks are read
        flat = arena.gaps.reshape(-1), arena.counts.reshape(-1)
        if (bad := find_bad_row(*flat, rows, store.manifest.n_genes)) >= 0:
            raise store.damaged(ValueError(f"cell {wanted[bad]} does not decode into counts"))
        n_gaps, n_counts, n_overflow = rows[:, 1::2].sum(0).tolist()
        gaps, counts, spilt = np.empty(n_gaps, "u1"), np.empty(n_counts, "u1"), np.empty(4 * n_overflow, "u1")
        gather(flat[0], rows[:, 0].copy(), rows[:, 1].copy(), gaps)
        gather(flat[1], rows[:, 2].copy(), rows[:, 3].copy(), counts)
        gather(flat[1], rows[:, 4].copy(), 4 * rows[:, 5], spilt)
        large = spilt.view("<u4")
        if dtype == np.float32 and len(large) and int(large.max()) > EXACT:
            raise UserError(f"A count of {int(large.max()):,} is not exact in float32: choose --dtype uint32.")
        gap_start = np.concatenate([[0], np.cumsum(rows[:, 1])])
        indices, values = np.empty(n_counts, np.int32), np.empty(n_counts, np.float32)
        unpack_rows(gaps, counts, large.view(np.int32), gap_start, indices, values)
        found = values.astype(dtype)
        found[counts == 255] = large
        yield indices, found
