"""A 10x .h5 file, of Cell Ranger 2 or later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_tools.inputs.source import Matrix, Source


@dataclass
class TenxH5Source(Source):
    """A 10x .h5 file. It stores genes x cells by column, which is cells x genes by row."""

    group: str = "matrix"

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        with h5py.File(self.path, "r") as file:
            group = file[self.group]
            indptr = group["indptr"][:].astype(np.int64)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                part = slice(indptr[first], indptr[last])
                arrays = (group["data"][part], group["indices"][part], indptr[first : last + 1] - indptr[first])
                yield first, sp.csr_matrix(arrays, shape=(last - first, self.matrices[name].shape[1]))


def open_10x(path: Path, file: h5py.File, name: str) -> Source:
    """Open a 10x .h5 whose matrix is the group ``name``."""
    group = file[name]

    def texts(item: str) -> list[str]:
        return [value.decode() for value in group[item][:]]

    if "features" in group:
        var = pd.DataFrame({"symbol": texts("features/name")}, index=texts("features/id"))
        for column in ("feature_type", "genome"):
            if f"features/{column}" in group:
                var[column] = texts(f"features/{column}")
    else:
        var = pd.DataFrame({"symbol": texts("gene_names"), "genome": name}, index=texts("genes"))
    obs = pd.DataFrame(index=texts("barcodes"))
    n_genes, n_cells = (int(size) for size in group["shape"][:])
    about = Matrix((n_cells, n_genes), group["data"].dtype, "csr", int(group["data"].shape[0]))
    return TenxH5Source(path, "10x h5", obs, {"X": var}, {"X": about}, {}, name)
