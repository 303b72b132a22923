"""A 10x .h5 file, of Cell Ranger 2 or later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import pandas as pd
import scipy.sparse as sp

from bgen.errors import UserError
from data_tools.inputs.hdf5 import open_hdf5
from data_tools.inputs.source import Matrix, Source, csr_rows


@dataclass
class TenxH5Source(Source):
    """A 10x .h5 file. It stores genes x cells by column, which is cells x genes by row."""

    group: str = "matrix"

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        n_cells, n_genes = self.matrices[name].shape
        with open_hdf5(self.path) as file:
            yield from csr_rows(file[self.group], n_genes, step, start, stop, n_cells)


def is_tenx_h5(path: Path) -> bool:
    """Whether a file is an HDF5 file with a matrix as Cell Ranger writes it."""
    try:
        with open_hdf5(path) as file:
            return bool(_groups(file))
    except (OSError, RuntimeError, KeyError, UserError):
        return False


def _groups(file: h5py.File) -> list[str]:
    """Return the names of the matrices: "matrix", or one per genome in files of before Cell Ranger 3."""
    groups = [name for name in file if isinstance(file[name], h5py.Group) and "indptr" in file[name]]
    if "matrix" in groups and "barcodes" in file["matrix"]:
        return ["matrix"]
    return [name for name in groups if "gene_names" in file[name]]


def open_tenx_h5(path: Path) -> Source:
    """Open a 10x .h5 without reading its matrix.

    Raises
    ------
    UserError
        If it holds several genomes.
    """
    with open_hdf5(path, ("",)) as file:
        names = _groups(file)
        if len(names) > 1:
            raise UserError(f"{path}: holds several genomes ({', '.join(names)}); write one file per genome.")
        group = file[names[0]]
        obs = pd.DataFrame(index=_texts(group["barcodes"]))
        if "features" in group:
            var = pd.DataFrame({"symbol": _texts(group["features/name"])}, index=_texts(group["features/id"]))
            for column in ("feature_type", "genome"):
                if f"features/{column}" in group:
                    about_genes = group[f"features/{column}"]  # one text may stand for all genes
                    var[column] = about_genes[()].decode() if about_genes.shape == () else _texts(about_genes)
        else:
            symbols = {"symbol": _texts(group["gene_names"]), "genome": names[0]}
            var = pd.DataFrame(symbols, index=_texts(group["genes"]))
        n_genes, n_cells = (int(size) for size in group["shape"][:])
        about = Matrix((n_cells, n_genes), group["data"].dtype, "csr", int(group["data"].shape[0]))
    return TenxH5Source(path, "10x h5", obs, {"X": var}, {"X": about}, group=names[0])


def _texts(item: h5py.Dataset) -> list[str]:
    return [value.decode() for value in item[:]]
