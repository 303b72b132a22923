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
from bgen.order.cells import Cells, Members, numbers, pick
from bgen.order.groups import parts
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
    cells = range(len(store)) if split is None else store.split(split)
    bare = _annotation(store, _some(cells, next(parts(len(cells)), slice(0, 0))))
    try:
        with whole(out, replace=False) as half:
            if out.suffix == ".h5ad":
                with slashes_in_names():
                    bare.write_h5ad(half)
                with h5py.File(half, "a") as file:
                    _write_obs(file, store, cells)
                    _write_counts(file, store, cells, np.dtype(dtype), progress)
            else:
                group = zarr.open_group(half, mode="w", zarr_format=2)  # every version of anndata reads it
                anndata.io.write_elem(group, "/", bare)
                _write_obs(group, store, cells)
                _write_counts(group, store, cells, np.dtype(dtype), progress)
                zarr.consolidate_metadata(half)
    except OSError as error:
        raise error if isinstance(error, UserError) else UserError(f"{out} cannot be written ({error}).") from None
    return len(cells)


def _some(cells: Cells, part: slice) -> I64:
    """Return the numbers of a part of some cells."""
    return numbers(cells[part])


def _annotation(store: Store, cells: I64) -> anndata.AnnData:
    """Return everything but the counts."""
    manifest = store.manifest
    uns: dict[str, Any] = {"organism": manifest.organism}
    uns |= {f"{role}_unit": unit for role, unit in manifest.units.items()}
    uns["bgen"] = {"store": store.fingerprint, "roles": dict(manifest.roles)}
    var = store.genes.set_index("id").rename_axis("gene")
    return anndata.AnnData(obs=_obs(store, cells), var=var, uns=uns)


def _obs(store: Store, cells: I64) -> pd.DataFrame:
    """Return barcodes, columns and split of some cells."""
    manifest = store.manifest
    obs = pd.DataFrame(index=pd.Index(store.names(cells=cells), name=index_name("cell", manifest.columns)))
    for name in manifest.columns:
        column, values = store.column(name, cells=cells)
        if column.kind == "number":
            obs[name] = values
        else:
            obs[name] = pd.Categorical.from_codes(values.astype(np.int32), column.categories)  # type: ignore[call-overload]
    if "split" not in obs:
        codes = store.rows("split")[cells].astype(np.int32)
        obs["split"] = pd.Categorical.from_codes(codes, list(manifest.splits))  # type: ignore[call-overload]
    return obs


def _write_obs(group: Any, store: Store, cells: Cells) -> None:
    """Write obs of all cells over that of the first part of them, a part at a time."""
    for part in parts(len(cells)):
        if part.start == 0:
            continue  # it is there
        obs = _obs(store, _some(cells, part))
        index = group[f"obs/{group['obs'].attrs['_index']}"]
        if not hasattr(index, "shape"):  # anndata 0.13 writes values, and which of them are missing
            if "mask" in index:
                _grow(group, index["mask"], len(cells))[part] = False
            index = index["values"]
        _grow(group, index, len(cells))[part] = obs.index.to_numpy()
        for name, values in obs.items():
            item = group[f"obs/{name}"]
            if isinstance(values.dtype, pd.CategoricalDtype):
                item, values = item["codes"], values.cat.codes
            _grow(group, item, len(cells))[part] = values.to_numpy()


def _grow(group: Any, array: Any, n: int) -> Any:
    """Return an array ``[n]`` in place of a shorter one, which its first entries are."""
    if array.shape[0] == n:
        return array
    if not isinstance(group, h5py.Group):
        array.resize((n,))
        return array
    path, first, attributes = array.name, array[:], dict(array.attrs)
    options = {"dtype": array.dtype, "chunks": (min(n, VALUES_PER_CHUNK),), "compression": array.compression}
    del group[path]
    longer = group.create_dataset(path, shape=(n,), **options)
    longer.attrs.update(attributes)
    longer[: len(first)] = first
    return longer


def _write_counts(group: Any, store: Store, cells: Cells, dtype: np.dtype, progress: Count | None) -> None:
    """Write the counts of ascending ``cells`` as X into an open HDF5 file or zarr group."""
    if "X" in group:
        del group["X"]
    target = group.create_group("X")
    shape = [len(cells), store.manifest.n_genes]
    target.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    nonzeros = pick(store.nonzeros, cells)
    total = int(nonzeros.sum(dtype=np.int64))
    make = target.create_dataset if isinstance(group, h5py.Group) else target.create_array
    options: dict[str, Any] = {"chunks": (min(VALUES_PER_CHUNK, max(total, 1)),)}
    if isinstance(group, h5py.Group):
        options["compression"] = "lzf"
    arrays = {
        name: make(name, shape=(total,), dtype=kind, **options)
        for name, kind in (("data", dtype), ("indices", np.int32))
    }
    pointer = make("indptr", shape=(len(cells) + 1,), dtype=np.int64)
    pointer[:1] = 0
    before = 0
    for part in parts(len(cells)):
        ends = before + np.cumsum(nonzeros[part], dtype=np.int64)
        pointer[part.start + 1 : part.stop + 1] = ends
        before = int(ends[-1])
    done = written = 0
    for n, indices, counts in _read(store, cells, dtype):
        end = done + len(indices)
        arrays["indices"][done:end], arrays["data"][done:end] = indices, counts
        done, written = end, written + n
        if progress:
            progress(written, len(cells))


def _read(store: Store, cells: Cells, dtype: np.dtype) -> Iterator[tuple[int, NDArray[np.int32], NDArray[Any]]]:
    """Yield how many cells are read, their gene numbers and counts, in their order, some chunks at a time."""
    members = Members.of(cells, store.first_cell)
    starts = np.concatenate([[0], members.ends])
    for some in range(0, len(members.chunks), CHUNKS_AT_ONCE):
        part = members.chunks[some : some + CHUNKS_AT_ONCE]
        wanted = members.take(np.arange(starts[some], starts[some + len(part)]))
        slots, arena = np.arange(len(part)), store.arena(len(part))
        futures = store.read_chunks(part, arena, slots)
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
        yield len(wanted), indices, found
