"""AnnData in memory, as an input like any file: a view, backed by a file, dense, sparse or of dask."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from bgen.errors import UserError
from bgen.store.format.sparse import plain, require_columns, require_pointer
from data_tools.inputs.source import Matrix, Source

NAME = Path("AnnData in memory")
"""What messages call it."""


@dataclass
class MemorySource(Source):
    """AnnData in memory."""

    adata: AnnData | None = None

    @property
    def is_in_memory(self) -> bool:
        """See :class:`Source`."""
        return True

    def rows_per_pass(self, name: str) -> int | None:
        """See :class:`Source`."""
        return self.n_cells if self.matrices[name].layout == "csc" else None

    def state(self) -> list[object]:
        """See :class:`Source`; without a file, a digest of all values."""
        if self.path.exists():
            return super().state()
        digest = hashlib.sha256()
        for name in self.matrices:
            for _, block in self.iterate(name):
                for array in (block.indptr, block.indices, block.data):
                    digest.update(np.ascontiguousarray(array).tobytes())
        return [str(self.path), digest.hexdigest()]

    def size(self) -> int:
        """See :class:`Source`; without a file, the bytes of the stored values."""
        if self.path.exists():
            return super().size()
        stored = (a.shape[0] * a.shape[1] if a.stored < 0 else a.stored for a in self.matrices.values())
        return sum(n * a.dtype.itemsize for n, a in zip(stored, self.matrices.values(), strict=True))

    def _rows(self, name: str, step: int, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        values: Any = self._values(name)
        layout = getattr(values, "format", "csr")  # of sparse ones
        if isinstance(values, sp.csr_matrix | sp.csc_matrix | sp.csr_array | sp.csc_array):
            require_pointer(values.indptr, min(len(values.indices), len(values.data)))
            require_columns(values.indices, values.shape[1 if layout == "csr" else 0])
        if layout != "csr":
            values = values.tocsr()  # rows of other layouts are spread over all of it
        dtype = self.matrices[name].dtype
        for first in range(start, stop, step):
            rows: Any = values[first : min(first + step, stop)]
            rows = rows.compute() if hasattr(rows, "compute") else rows
            parts: Any = rows
            if not sp.issparse(rows):
                block = sp.csr_matrix(plain(rows))
            elif np.dtype(dtype).isnative:
                block = sp.csr_matrix(parts)
            else:
                block = sp.csr_matrix((plain(parts.data), parts.indices, parts.indptr), shape=parts.shape)
            # A matrix in order may share memory with the user's; any other is put in order, in a copy.
            yield first, block if block.has_canonical_format else block.copy()

    def _values(self, name: str) -> Any:
        assert self.adata is not None, "only annotation was asked for"
        if name == "X":
            return self.adata.X
        return self.adata.raw.X if name == "raw/X" else self.adata.layers[name.removeprefix("layers/")]

    def _everything(self) -> AnnData:
        assert self.adata is not None, "only annotation was asked for"
        return self.adata


def open_memory(adata: AnnData) -> MemorySource:
    """Take AnnData in memory (one that is backed by a file is read into memory).

    Raises
    ------
    UserError
        If its file is closed.
    """
    if adata.isbacked:
        try:
            adata = adata.to_memory()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"The file behind the backed AnnData cannot be read ({error}). Is it closed?") from error
    values: dict[str, Any] = {"X": adata.X, "raw/X": None if adata.raw is None else adata.raw.X}
    # anndata 0.13 counts X among the layers, as None
    values |= {f"layers/{name}": layer for name, layer in adata.layers.items() if name is not None}
    matrices = {name: about for name, matrix in values.items() if (about := _describe(matrix))}
    variables = {name: _frame(adata.raw.var if name == "raw/X" else adata.var) for name in matrices}
    uns = {key: value for key, value in adata.uns.items() if isinstance(value, str | int | float | np.generic)}
    return MemorySource(NAME, "AnnData in memory", _frame(adata.obs), variables, matrices, uns, adata=adata)


def _describe(values: Any) -> Matrix | None:
    """Return what is known of a matrix, None for what is none."""
    if values is None or len(values.shape) != 2:
        return None
    rows, columns = values.shape
    if not sp.issparse(values):
        return Matrix((int(rows), int(columns)), np.dtype(values.dtype), "dense", -1)
    stored: Any = values
    return Matrix((int(rows), int(columns)), stored.dtype, "csr" if stored.format == "csr" else "csc", int(stored.nnz))


def _frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return annotation with a text index."""
    copied = frame.copy(deep=False)
    copied.index = copied.index.astype(str)
    return copied
