"""Cells that are open without being loaded.

A :class:`Source` knows its cells, genes and matrices, and reads a matrix as CSR blocks of rows. It keeps no file open
between calls, so that it can be sent to another process. Each format is a subclass with a ``_rows`` method: see
README.md in this folder.

Axes: N cells, G genes of the file.
"""

from __future__ import annotations

import abc
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from bgen.errors import Unreachable, UserError, nearest
from bgen.names import shown
from bgen.store.format.sparse import Pointer, plain, read_pointer, require_columns

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
        Where it is; for cells in memory, what messages call them.
    kind
        Name of the format, as the manifest of a store has it: "h5ad", "10x mtx".
    obs
        Annotation of the N cells, index = barcodes.
    variables
        Annotation of the genes per matrix name; ``raw/X`` may have other genes than ``X``.
    matrices
        Matrix name ("X", "raw/X", "layers/counts") to what is known of it.
    uns
        Texts and numbers at the top of ``uns``, such as organism and time_unit.
    notes
        How an unusual file was understood, a sentence each: a header line, a transposed matrix.
    """

    path: Path
    kind: str
    obs: pd.DataFrame
    variables: dict[str, pd.DataFrame]
    matrices: dict[str, Matrix]
    uns: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse texts that cannot be written again, before anything is made of them."""
        _require_texts(self.path, "obs", self.obs)
        for name, frame in self.variables.items():
            _require_texts(self.path, f"var of {name}", frame)

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
                require_columns(block.indices, block.shape[1])
                block.sum_duplicates()
                yield first, block
        except UserError:
            raise
        except OSError as error:
            raise Unreachable(f"{self.path}: '{name}' cannot be read ({error}). Is the file damaged?") from error
        except Exception as error:  # whatever the libraries say of a damaged file
            raise UserError(f"{self.path}: '{name}' cannot be read ({error}). Is the file damaged?") from error

    def rows_per_pass(self, name: str) -> int | None:
        """Return how many rows of a matrix are worth one pass over all of it; None: rows can be read by themselves."""
        about = self.matrices[name]
        return max(1, int(self.n_cells * CSC_VALUES / max(about.stored, 1))) if about.layout == "csc" else None

    def _stored_rows(
        self, item: Any, name: str, step: int, start: int, stop: int
    ) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield blocks of rows of the matrix ``name``, stored as ``item``: a sparse matrix's group, or an array."""
        about = self.matrices[name]
        if per_pass := self.rows_per_pass(name):
            yield from csc_rows(item, about, per_pass, step, start, stop)
        elif about.layout == "csr":
            yield from csr_rows(item, about.shape[1], step, start, stop, about.shape[0])
        else:
            for first in range(start, stop, step):
                yield first, sp.csr_matrix(plain(item[first : min(first + step, stop)]))

    def read(self) -> AnnData:
        """Return everything that the file holds, in memory.

        Raises
        ------
        UserError
            If it is damaged.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are not unique
            try:
                return self._everything()
            except UserError:
                raise
            except Exception as error:  # whatever the libraries say of a damaged file
                raise UserError(f"{self.path}: cannot be read ({error}). Is the file damaged?") from error

    def state(self) -> list[object]:
        """Return what changes when the file, or a folder of files, is written again."""
        files = sorted(one for one in self.path.rglob("*") if one.is_file()) if self.path.is_dir() else [self.path]
        stats = [one.stat() for one in files]
        return [str(self.path.absolute()), len(files), sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)]

    def size(self) -> int:
        """Return the bytes of the file, or of all files of the folder."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(one.stat().st_size for one in files if one.is_file())

    @property
    def is_in_memory(self) -> bool:
        """Whether the values are in memory, so that other processes would get copies of them."""
        return False

    def _everything(self) -> AnnData:
        """Assemble AnnData; formats that anndata reads itself leave that to anndata."""
        parts = {name: sp.vstack([block for _, block in self._rows(name, self.n_cells, 0, self.n_cells)], format="csr")
                 for name in self.matrices}  # fmt: skip
        layers = {name.removeprefix("layers/"): part for name, part in parts.items() if name.startswith("layers/")}
        var = self.variables["X" if "X" in parts else next(iter(parts))]
        return AnnData(parts.get("X"), obs=self.obs.copy(), var=var.copy(), layers=layers, uns=dict(self.uns))

    def _default_rows(self, name: str) -> int:
        about = self.matrices[name]
        stored = about.shape[0] * about.shape[1] if about.stored < 0 else 2 * about.stored
        return max(1, int(BLOCK_BYTES * self.n_cells / max(stored * about.dtype.itemsize, 1)))

    @abc.abstractmethod
    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield the blocks of rows of a matrix that is there."""


def csr_rows(
    group: Any, n_columns: int, step: int, start: int, stop: int, n_rows: int
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield blocks of at most ``step`` rows of a stored CSR matrix; of fewer, where these hold very many values."""
    pointer = Pointer(group, n_rows)
    first = start
    while first < stop:
        indptr = pointer.window(first, min(first + step, stop))
        full = int(np.searchsorted(indptr, indptr[0] + CSC_VALUES, side="right")) - 1
        rows = min(len(indptr) - 1, max(full, 1))
        last, part = first + rows, slice(int(indptr[0]), int(indptr[rows]))
        if part.stop - part.start > max(CSC_VALUES, 2 * n_columns):
            raise ValueError(f"row {first} has {part.stop - part.start:,} values, and there are {n_columns:,} genes")
        indices = plain(group["indices"][part])
        require_columns(indices, n_columns)
        arrays = (plain(group["data"][part]), indices, indptr[: rows + 1] - indptr[0])
        yield first, sp.csr_matrix(arrays, shape=(last - first, n_columns))
        first = last


def csc_rows(
    group: Any, about: Matrix, per_pass: int, step: int, start: int, stop: int
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield blocks of ``step`` rows of a stored CSC matrix, from passes over it that collect ``per_pass`` rows each."""
    indptr = read_pointer(group, about.shape[1])
    edges = [0]  # of blocks of columns that are read at once
    while edges[-1] < about.shape[1]:
        far = int(np.searchsorted(indptr, indptr[edges[-1]] + CSC_VALUES // 8, side="right")) - 1
        edges.append(max(far, edges[-1] + 1))
    for low in range(start, stop, per_pass):
        high = min(low + per_pass, stop)
        parts = []
        for left, right in itertools.pairwise(edges):
            part = slice(indptr[left], indptr[right])
            rows = plain(group["indices"][part])
            require_columns(rows, about.shape[0])
            inside = np.flatnonzero((rows >= low) & (rows < high))
            columns = np.repeat(np.arange(left, right, dtype=np.int32), np.diff(indptr[left : right + 1]))
            parts.append((plain(group["data"][part])[inside], rows[inside] - low, columns[inside]))
        data, rows, columns = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        block = sp.csr_matrix((data, (rows, columns)), shape=(high - low, about.shape[1]))
        for first in range(low, high, step):
            yield first, sp.csr_matrix(block[first - low : min(first + step, high) - low])


def require_names(path: Path) -> Callable[[pd.Index], None]:
    """Return what refuses names of cells that cannot be written again, as :class:`Source` does."""
    return lambda names: _require_texts(path, "obs", pd.DataFrame(index=names))


def _require_texts(path: Path, where: str, frame: pd.DataFrame) -> None:
    """Check that no name and no text holds a NUL character, which no .h5ad can.

    Raises
    ------
    UserError
        If one does.
    """
    columns = ((name, pd.Index(column)) for name, column in frame.items())
    for name, values in (("names", frame.index), ("columns", frame.columns), *columns):
        distinct = values.categories if isinstance(values, pd.CategoricalIndex) else values
        if not (pd.api.types.is_object_dtype(distinct) or pd.api.types.is_string_dtype(distinct)):
            continue
        # not by the methods of pandas: what they make holds itself, with every text, until cycles are collected
        if "\0" in "".join(texts := [str(text) for text in distinct]):
            bad = next(number for number, text in enumerate(texts) if "\0" in text)
            raise UserError(
                f"{path}: {where}, {shown(name)}: {shown(distinct[bad])} holds a NUL character. The"
                " file is damaged, or was not written as text."
            )
