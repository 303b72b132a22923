"""An .h5ad file, or a modality of an .h5mu file, through anndata's own readers.

Files from before anndata 0.7 (with obs and var as compound arrays, and categories in uns) are read whole by anndata.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from bgen.errors import UserError
from data_tools.cells.columns import read_stored
from data_tools.cells.texts import Texts
from data_tools.inputs.hdf5 import open_hdf5
from data_tools.inputs.in_memory import MemorySource, open_memory
from data_tools.inputs.source import Matrix, Source, require_names

ANNOTATION = ("obs/", "var/", "raw/var/")
"""What is read whole when a file is opened."""

MODALITY = "rna"
"""The modality of an .h5mu that is read."""


@dataclass
class H5adSource(Source):
    """An .h5ad file, or a ``group`` of a file that is laid out as one."""

    group: str = "/"

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        with open_hdf5(self.path) as file:
            yield from self._stored_rows(file[self.group][name], name, step, start, stop)

    def _everything(self) -> AnnData:
        with open_hdf5(self.path) as file:
            return anndata.read_h5ad(self.path) if self.group == "/" else anndata.io.read_elem(file[self.group])


def is_h5ad(path: Path) -> bool:
    """Whether a file is an HDF5 file with obs and var."""
    return _holds(path, "obs", "var") and not is_h5mu(path)


def is_h5mu(path: Path) -> bool:
    """Whether a file is an HDF5 file of several modalities."""
    return _holds(path, "mod")


def _holds(path: Path, *names: str) -> bool:
    try:
        with h5py.File(path, "r") as file:  # what a link leads to is not asked for
            return all(file.get(name, getlink=True) is not None for name in names)
    except (OSError, RuntimeError):
        return False


def open_h5ad(path: Path) -> Source:
    """Open an .h5ad without reading its matrices (one of before anndata 0.7 is read whole)."""
    return _open_h5ad(path, None)


def open_compact_h5ad(path: Path, names: Texts) -> Source:
    """Open an .h5ad and read obs a part at a time: :func:`data_tools.cells.columns.compact`."""
    return _open_h5ad(path, names)


def _open_h5ad(path: Path, names: Texts | None) -> Source:
    with open_hdf5(path, ANNOTATION) as file:
        if not isinstance(file["obs"], h5py.Dataset):
            return _open_group(path, "h5ad", file, "/", names)
    with open_hdf5(path, ("",)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's remarks about files that older versions wrote
        whole = open_memory(anndata.read_h5ad(path))
    return MemorySource(path, "h5ad", whole.obs, whole.variables, whole.matrices, whole.uns, (), whole.adata)


def open_h5mu(path: Path) -> Source:
    """Open the modality "rna" of an .h5mu without reading its matrices.

    Raises
    ------
    UserError
        If there is no such modality; names those that there are.
    """
    with open_hdf5(path, tuple(f"mod/{MODALITY}/{name}" for name in ANNOTATION)) as file:
        modalities = list(file["mod"])
        if MODALITY not in modalities:
            raise UserError(
                f"{path}: holds the modalities {', '.join(modalities) or 'none'}; bgen reads '{MODALITY}'. Write"
                " the one with counts of genes as an .h5ad."
            )
        source = _open_group(path, "h5mu", file, f"mod/{MODALITY}")
    others = ", ".join(name for name in modalities if name != MODALITY)
    source.notes = (f"Of an .h5mu the modality '{MODALITY}' is read; it also holds {others or 'no other'}.",)
    return source


def _open_group(path: Path, kind: str, file: h5py.File, name: str, cells: Texts | None = None) -> H5adSource:
    group = file[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's remarks about files that older versions wrote
        obs = None if cells is None else read_stored(group["obs"], cells, require_names(path))
        obs = _frame(anndata.io.read_elem(group["obs"])) if obs is None else obs
        names = [name for name in ("X", "raw/X") if name in group]
        names += [f"layers/{name}" for name in group.get("layers", {})]
        var = _frame(anndata.io.read_elem(group["var"]))
        variables = dict.fromkeys(names, var)
        if "raw/var" in group and "raw/X" in names:
            variables["raw/X"] = _frame(anndata.io.read_elem(group["raw/var"]))
        uns = {}
        for key, item in group.get("uns", {}).items():
            if isinstance(item, h5py.Dataset) and item.shape == ():
                value = item[()]
                uns[key] = value.decode() if isinstance(value, bytes) else value
        matrices = {name: about for name in names if (about := _describe(group[name]))}
    return H5adSource(path, kind, obs, variables, matrices, uns, group=name)


def _describe(item: h5py.Group | h5py.Dataset) -> Matrix | None:
    """Return what is known of a matrix, None for an item that is none (anndata writes X = None as a null)."""
    if isinstance(item, h5py.Dataset):
        return Matrix(item.shape, item.dtype, "dense", -1) if item.shape is not None and len(item.shape) == 2 else None
    if "indptr" not in item:
        return None
    values = anndata.io.sparse_dataset(item)
    rows, columns = values.shape
    return Matrix((int(rows), int(columns)), values.dtype, values.format, int(item["data"].shape[0]))


def _frame(value: Any) -> pd.DataFrame:
    """Return annotation as a frame with a text index."""
    frame = value if isinstance(value, pd.DataFrame) else pd.DataFrame(value)
    frame.index = frame.index.astype(str)
    return frame
