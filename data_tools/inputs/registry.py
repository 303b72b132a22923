"""The formats of cells that bgen reads, and the one way to open any of them.

Axes: N cells, G genes of the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
from anndata import AnnData

from bgen.errors import UserError, nearest
from data_tools.cells.columns import compact
from data_tools.cells.texts import Texts
from data_tools.inputs.anndata_zarr import is_zarr, members_of_zarr, open_zarr
from data_tools.inputs.h5ad import is_h5ad, is_h5mu, open_compact_h5ad, open_h5ad, open_h5mu
from data_tools.inputs.hdf5_probe import require_readable
from data_tools.inputs.in_memory import open_memory
from data_tools.inputs.parquet import is_parquet, members_of_parquet, open_parquet
from data_tools.inputs.soma import is_soma, open_soma
from data_tools.inputs.source import Source
from data_tools.inputs.tenx_h5 import is_tenx_h5, open_tenx_h5
from data_tools.inputs.tenx_mtx import is_mtx, open_mtx

CONVERTED = {
    ".loom": "anndata.io.read_loom(path).write_h5ad(...) makes an .h5ad of it",
    ".rds": "write it from R as .h5ad, with zellkonverter::writeH5AD of a SingleCellExperiment (a Seurat object:"
    " as.SingleCellExperiment), or as a 10x folder, with DropletUtils::write10xCounts",
    ".h5seurat": "write it from R as .h5ad, with SeuratDisk::Convert",
    ".csv": "anndata.io.read_csv(path).write_h5ad(...) makes an .h5ad of it, if cells are rows; transpose it if not",
    ".tsv": "anndata.io.read_text(path).write_h5ad(...) makes an .h5ad of it, if cells are rows; transpose it if not",
}
"""Formats that bgen does not read, and what makes of them one that it reads. Names end so before ".gz", if they do."""


def itself(path: Path) -> list[Path]:
    """Return a file as the only one that it holds."""
    return [path]


@dataclass(frozen=True)
class Format:
    """A format of cells.

    Attributes
    ----------
    written
        How users know it, such as ".h5ad".
    fits
        Whether a path that is there is of this format; must not raise, whatever the path holds.
    open
        Open such a path without reading its matrices. It may raise OSError, KeyError, ValueError or RuntimeError where
        the file is damaged, UserError with the fix where something else is wrong.
    members
        The inputs that a path of this format holds; more than one for a collection.
    open_compact
        Open such a path, read obs a part of the cells at a time, and add the names of the cells to texts
        (:func:`data_tools.cells.columns.compact`); where it adds none, or there is no such function, obs is read whole.
    """

    written: str
    fits: Callable[[Path], bool]
    open: Callable[[Path], Source]
    members: Callable[[Path], list[Path]] = itself
    open_compact: Callable[[Path, Texts], Source] | None = None


FORMATS: dict[str, Format] = {
    "h5ad": Format(".h5ad", is_h5ad, open_h5ad, open_compact=open_compact_h5ad),
    "h5mu": Format(".h5mu", is_h5mu, open_h5mu),
    "anndata zarr": Format("AnnData in zarr", is_zarr, open_zarr, members_of_zarr),
    "10x h5": Format("10x .h5", is_tenx_h5, open_tenx_h5),
    "10x mtx": Format("10x .mtx folders", is_mtx, open_mtx),
    "parquet": Format("parquet files of lists of genes", is_parquet, open_parquet, members_of_parquet),
    "soma": Format("SOMA experiments", is_soma, open_soma),
}
"""Formats by name; a path is of the first one that it fits."""


def format_of(path: Path) -> Format | None:
    """Return the format of a path that is there, None if it is of no known one."""
    return next((one for one in FORMATS.values() if one.fits(path)), None)


def members(path: Path) -> list[Path]:
    """Return the inputs that a path holds: those of a collection, else itself."""
    found = format_of(path) if path.exists() else None
    return found.members(path) if found else [path]


def open_source(data: str | os.PathLike[str] | AnnData, names: Texts | None = None) -> Source:
    """Open a file or folder of cells, or AnnData in memory.

    Parameters
    ----------
    names
        Add the names of the cells to these texts, and keep obs without them and in little memory
        (:func:`data_tools.cells.columns.compact`).

    Raises
    ------
    UserError
        If it is missing, of no known format, damaged, or without cells or genes.
    """
    before = 0 if names is None else len(names)
    if isinstance(data, AnnData):
        source: Source = open_memory(data)
    else:
        path = Path(data)
        if not path.exists():
            folder = path.parent if path.parent.is_dir() else Path()
            hint = nearest(path.name, [p.name for p in folder.iterdir()])
            raise UserError(f"{path}: there is no such file.{hint if hint.startswith(' Did') else ''}")
        if path.is_file() and h5py.is_hdf5(path):
            require_readable(path)
        found = format_of(path)
        if found is None:
            raise _unknown(path)
        try:
            source = found.open(path) if names is None or not found.open_compact else found.open_compact(path, names)
        except UserError:
            raise
        except Exception as error:  # whatever the libraries say of a damaged file
            raise UserError(f"{path}: cannot be read ({error}). Is the file damaged or cut off?") from error
    _require_shapes(source)
    if names is not None and len(names) == before:
        source.obs = compact(source.obs, names)
    return source


def _require_shapes(source: Source) -> None:
    path = source.path
    for name, about in source.matrices.items():
        if 0 in about.shape:
            raise UserError(f"{path}: '{name}' is empty ({about.shape[0]} cells x {about.shape[1]} genes).")
        if about.shape != (source.n_cells, len(source.variables[name])):
            raise UserError(
                f"{path}: '{name}' is {about.shape[0]} x {about.shape[1]}, but there are annotations for "
                f"{source.n_cells} cells and {len(source.variables[name])} genes. Write the file again."
            )
    if not source.matrices:
        raise UserError(f"{path}: there is no matrix in it, neither X nor raw/X nor a layer.")


def _unknown(path: Path) -> UserError:
    """Return the error for a path of no known format."""
    if path.is_dir():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        return UserError(
            f"{path}: a 10x folder needs matrix.mtx (plain or .gz), and it is no zarr group. The folder holds: {there}."
        )
    if path.stat().st_size == 0:
        return UserError(f"{path}: the file is empty (0 bytes).")
    name = path.name.lower().removesuffix(".gz")
    if way := next((way for ending, way in CONVERTED.items() if name.endswith(ending)), None):
        return UserError(f"{path}: bgen does not read this format; {way}.")
    if not h5py.is_hdf5(path):
        known = [one.written for one in FORMATS.values()]
        hint = " Give the folder that holds it instead." if ".mtx" in path.name else ""
        return UserError(
            f"{path}: this is not an .h5ad (not an HDF5 file, or its start is missing).{hint} bgen reads"
            f" {', '.join(known[:-1])} and {known[-1]}."
        )
    try:
        with h5py.File(path, "r") as file:
            return UserError(
                f"{path}: an HDF5 file, but not an .h5ad (no obs and var) and not a 10x .h5 (no matrix/barcodes). "
                f"It holds: {', '.join(list(file)[:8]) or 'nothing'}."
            )
    except (OSError, KeyError, RuntimeError) as error:
        return UserError(f"{path}: cannot be read ({error}). Is the file damaged or cut off?")
