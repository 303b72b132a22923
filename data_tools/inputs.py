"""Open a file of cells without loading it: .h5ad, 10x .h5, 10x folder of .mtx, AnnData in zarr.

A :class:`Source` knows its cells, genes and matrices, and reads a matrix as CSR blocks of rows. It keeps no file open
between calls, so that it can be sent to another process. Another format is another subclass with a ``_rows`` method.

Axes: N cells, G genes of the file.
"""

from __future__ import annotations

import abc
import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from bgen.config.errors import UserError, nearest

BLOCK_BYTES = 32 << 20
"""Bytes that a default block of rows takes, about: values and, if sparse, column numbers."""

CSC_VALUES = 1 << 25
"""Values of a CSC matrix that are held in memory at once, about."""


@dataclass(frozen=True)
class Matrix:
    """What is known of a matrix without reading it. ``stored`` is -1 for a dense one."""

    shape: tuple[int, int]
    dtype: np.dtype
    layout: str
    stored: int


@dataclass
class Source(abc.ABC):
    """A file or folder of cells.

    Attributes
    ----------
    path
        Where it is.
    kind
        "h5ad", "anndata zarr", "10x h5" or "10x mtx".
    obs
        Annotation of the N cells, index = barcodes.
    variables
        Annotation of the genes per matrix name; ``raw/X`` may have other genes than ``X``.
    matrices
        Matrix name ("X", "raw/X", "layers/counts") to what is known of it.
    uns
        Texts and numbers at the top of ``uns``, such as organism and time_unit.
    """

    path: Path
    kind: str
    obs: pd.DataFrame
    variables: dict[str, pd.DataFrame]
    matrices: dict[str, Matrix]
    uns: dict[str, Any] = field(default_factory=dict)

    @property
    def n_cells(self) -> int:
        """N."""
        return len(self.obs)

    def var(self, matrix: str = "X") -> pd.DataFrame:
        """Return the annotation of a matrix's genes, index = names."""
        return self.variables[self.matrix_name(matrix)]

    def matrix_name(self, name: str) -> str:
        """Return the name of a matrix as this class writes it; "raw.X", "raw" and "counts" are understood.

        Raises
        ------
        UserError
            If there is no such matrix; names the nearest.
        """
        given = name.replace("layers['", "layers/").replace("']", "").replace("raw.X", "raw/X")
        for candidate in (given, f"{given}/X", f"layers/{given}"):
            if candidate in self.matrices:
                return candidate
        raise UserError(f"{self.path}: there is no matrix '{name}'.{nearest(name, self.matrices)}")

    def iterate(
        self, matrix: str = "X", rows_per_chunk: int | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield ``(first row, CSR block)`` in the stored dtype for the rows ``start:stop``.

        Blocks have sorted column numbers and no column twice in a row (values stored twice are summed, which is what
        they mean). CSR and dense matrices are read block by block; of a CSC matrix, whose rows are spread over the
        whole file, as many rows as fit in memory are collected in one pass over it.

        Raises
        ------
        UserError
            If there is no such matrix, or the file breaks off.
        """
        name = self.matrix_name(matrix)
        stop = self.n_cells if stop is None else min(stop, self.n_cells)
        step = rows_per_chunk or self._default_rows(name)
        try:
            for first, block in self._rows(name, step, start, stop):
                block.sum_duplicates()
                yield first, block
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.path}: '{name}' cannot be read ({error}). Is the file damaged?") from error

    def rows_per_pass(self, name: str) -> int | None:
        """Return how many rows of a matrix are worth one pass over all of it; None: rows can be read by themselves."""
        about = self.matrices[name]
        return max(1, int(self.n_cells * CSC_VALUES / max(about.stored, 1))) if about.layout == "csc" else None

    def _default_rows(self, name: str) -> int:
        about = self.matrices[name]
        stored = about.shape[0] * about.shape[1] if about.stored < 0 else 2 * about.stored
        return max(1, int(BLOCK_BYTES * self.n_cells / max(stored * about.dtype.itemsize, 1)))

    @abc.abstractmethod
    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield the blocks of rows of a matrix that is there."""


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


@dataclass
class TenxMtxSource(Source):
    """A 10x folder; text has to be read whole, once per pass."""

    file: Path = Path("matrix.mtx")

    def rows_per_pass(self, name: str) -> int | None:
        """See :class:`Source`."""
        return self.n_cells

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        whole = sp.csc_matrix(scipy.io.mmread(self.file, spmatrix=False)).T
        for first in range(start, stop, step):
            yield first, sp.csr_matrix(whole[first : min(first + step, stop)])


def csc_rows(
    group: Any, about: Matrix, per_pass: int, step: int, start: int, stop: int
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield blocks of ``step`` rows of a stored CSC matrix, from passes over it that collect ``per_pass`` rows each."""
    indptr = np.asarray(group["indptr"][:]).astype(np.int64)
    edges = [0]  # of blocks of columns that are read at once
    while edges[-1] < about.shape[1]:
        far = int(np.searchsorted(indptr, indptr[edges[-1]] + CSC_VALUES // 8, side="right")) - 1
        edges.append(max(far, edges[-1] + 1))
    for low in range(start, stop, per_pass):
        high = min(low + per_pass, stop)
        parts = []
        for left, right in itertools.pairwise(edges):
            part = slice(indptr[left], indptr[right])
            rows = np.asarray(group["indices"][part])
            inside = np.flatnonzero((rows >= low) & (rows < high))
            columns = np.repeat(np.arange(left, right, dtype=np.int32), np.diff(indptr[left : right + 1]))
            parts.append((np.asarray(group["data"][part])[inside], rows[inside] - low, columns[inside]))
        data, rows, columns = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        block = sp.csr_matrix((data, (rows, columns)), shape=(high - low, about.shape[1]))
        for first in range(low, high, step):
            yield first, sp.csr_matrix(block[first - low : min(first + step, high) - low])


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
    from data_tools.inputs_zarr import is_zarr, open_zarr  # which builds on this module

    return open_zarr(path) if is_zarr(path) else _open_mtx(path)


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
                return _open_10x(path, file, "matrix")
            if "obs" in file and "var" in file:
                return _open_h5ad(path, file)
            old = [name for name in groups if "gene_names" in file[name]]
            if len(old) == 1:
                return _open_10x(path, file, old[0])
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


def _open_h5ad(path: Path, file: h5py.File) -> Source:
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


def _open_10x(path: Path, file: h5py.File, name: str) -> Source:
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


def _open_mtx(path: Path) -> Source:
    """Open a folder with matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), each plain or .gz."""

    def find(*names: str) -> Path:
        for name in names:
            for hit in (path / name, path / f"{name}.gz"):
                if hit.exists():
                    return hit
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path}: a 10x folder needs {' or '.join(names)} (plain or .gz). The folder holds: {there}.")

    file = find("matrix.mtx")
    features_file, barcodes_file = find("features.tsv", "genes.tsv"), find("barcodes.tsv")
    try:
        features = pd.read_csv(features_file, sep="\t", header=None, dtype=str, keep_default_na=False)
        barcodes = pd.read_csv(barcodes_file, sep="\t", header=None, dtype=str, keep_default_na=False)
        n_genes, n_cells, stored, _, values, _ = scipy.io.mminfo(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a 10x folder ({error}).") from error
    columns = ["symbol", "feature_type"][: features.shape[1] - 1]
    var = features.iloc[:, 1 : 1 + len(columns)].set_axis(columns, axis=1).set_index(pd.Index(features[0], name=None))
    obs = pd.DataFrame(index=pd.Index(barcodes[0], name=None))
    about = Matrix((n_cells, n_genes), np.dtype(np.int64 if values == "integer" else np.float64), "csc", int(stored))
    return TenxMtxSource(path, "10x mtx", obs, {"X": var}, {"X": about}, {}, file)
