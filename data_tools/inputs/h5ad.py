"""An .h5ad file, through anndata's own readers."""

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

from data_tools.inputs.source import Matrix, Source, csc_rows


@dataclass
class AnnDataSource(Source):
    """An .h5ad file, through anndata's own readers."""

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        with h5py.File(self.path, "r") as file:
            item = file[name]
            if per_pass := self.rows_per_pass(name):
                yield from csc_rows(item, self.matrices[name], per_pass, step, start, stop)
                return
            values: Any = item if isinstance(item, h5py.Dataset) else anndata.io.sparse_dataset(item)
            for first in range(start, stop, step):
                yield first, sp.csr_matrix(values[first : min(first + step, stop)])


def open_h5ad(path: Path, file: h5py.File) -> Source:
    """Open an .h5ad without reading its matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's remarks about files that older versions wrote
        obs = _frame(anndata.io.read_elem(file["obs"]))
        names = [name for name in ("X", "raw/X") if name in file]
        names += [f"layers/{name}" for name in file.get("layers", {})]
        var = _frame(anndata.io.read_elem(file["var"]))
        variables = dict.fromkeys(names, var)
        if "raw/var" in file and "raw/X" in names:
            variables["raw/X"] = _frame(anndata.io.read_elem(file["raw/var"]))
        uns = {}
        for key, item in file.get("uns", {}).items():
            if isinstance(item, h5py.Dataset) and item.shape == ():
                value = item[()]
                uns[key] = value.decode() if isinstance(value, bytes) else value
        matrices = {name: _describe(file[name]) for name in names}
    return AnnDataSource(path, "h5ad", obs, variables, {name: about for name, about in matrices.items() if about}, uns)


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
