"""Open a file or folder of cells of any format that bgen reads."""

from __future__ import annotations

import os
from pathlib import Path

import h5py

from bgen.errors import UserError, nearest
from data_tools.inputs.anndata_zarr import is_zarr, open_zarr
from data_tools.inputs.h5ad import open_h5ad
from data_tools.inputs.source import Source
from data_tools.inputs.tenx_h5 import open_10x
from data_tools.inputs.tenx_mtx import open_mtx


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file or folder of cells.

    Raises
    ------
    UserError
        If it is missing, of no known kind, damaged, or without cells or genes.
    """
    path = Path(path)
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path()
        hint = nearest(path.name, [p.name for p in folder.iterdir()])
        raise UserError(f"{path}: there is no such file.{hint if hint.startswith(' Did') else ''}")
    source = _open_folder(path) if path.is_dir() else _open_hdf5(path)
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
    return source


def _open_folder(path: Path) -> Source:
    return open_zarr(path) if is_zarr(path) else open_mtx(path)


def _open_hdf5(path: Path) -> Source:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes).")
    if not h5py.is_hdf5(path):
        hint = " Give the folder that holds it instead." if ".mtx" in path.name else ""
        raise UserError(
            f"{path}: this is not an .h5ad (not an HDF5 file, or its start is missing).{hint} "
            "bgen reads .h5ad, AnnData in zarr, 10x .h5 and 10x .mtx folders."
        )
    try:
        with h5py.File(path, "r") as file:
            groups = [name for name in file if isinstance(file[name], h5py.Group) and "indptr" in file[name]]
            if "matrix" in groups and "barcodes" in file["matrix"]:
                return open_10x(path, file, "matrix")
            if "obs" in file and "var" in file:
                return open_h5ad(path, file)
            old = [name for name in groups if "gene_names" in file[name]]
            if len(old) == 1:
                return open_10x(path, file, old[0])
            if old:
                raise UserError(f"{path}: holds several genomes ({', '.join(old)}); write one file per genome.")
            raise UserError(
                f"{path}: an HDF5 file, but not an .h5ad (no obs and var) and not a 10x .h5 (no matrix/barcodes). "
                f"It holds: {', '.join(list(file)[:8]) or 'nothing'}."
            )
    except UserError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Is the file damaged or cut off?") from error
