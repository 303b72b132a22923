"""The counts of a store, cut into pieces that can be read independently: rows of a file, or of something in memory.

A piece is read in blocks of rows, whose columns are still those of the input; a map says which gene each column is
added to. Pieces can be sent to another process.

Axes: N rows of all inputs together, M columns of an input, G genes of the store, NNZ entries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.order.keys import hash_keys
from data_tools.check.findings import FileReport, Rounding
from data_tools.inputs.source import Source

PIECE_VALUES = 1 << 25
"""Stored values in a piece, approximately: what one process holds of the input at once."""

BLOCK_ROWS = 8192
"""Rows in a block of something in memory."""


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows of an input.

    Attributes
    ----------
    start
        Number of the first one among the N rows of all inputs.
    indptr, columns, counts
        CSR with columns in any order, uint32; zeros may be stored.
    """

    start: int
    indptr: I64
    columns: NDArray[np.integer[Any]]
    counts: NDArray[np.uint32]


class Piece(Protocol):
    """Consecutive rows of an input, which can be read independently."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def what(self) -> str:
        """What is read, for messages."""

    def gene_map(self) -> I64:
        """Return int64 ``[M]``: the gene that each column is added to, -1 = none."""

    def blocks(self) -> Iterator[Block]:
        """Read the rows."""


class CountRows(Protocol):
    """Counts ``[N, G]`` that can be read by rows: a CSR matrix, or an object that reads or draws one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, G)."""

    def __getitem__(self, rows: I64, /) -> sp.csr_matrix:
        """Return rows as CSR of non-negative integers."""


@dataclass(frozen=True, eq=False)
class RowsPiece:
    """Rows of something in memory, whose columns are the store's genes."""

    counts: CountRows
    start: int
    stop: int
    what: str = "the counts"

    @property
    def rows(self) -> int:
        """See :class:`Piece`."""
        return self.stop - self.start

    def gene_map(self) -> I64:
        """See :class:`Piece`."""
        return np.arange(self.counts.shape[1])

    def blocks(self) -> Iterator[Block]:
        """See :class:`Piece`."""
        for start in range(self.start, self.stop, BLOCK_ROWS):
            rows = self.counts[np.arange(start, min(start + BLOCK_ROWS, self.stop))]
            yield Block(start, rows.indptr.astype(np.int64), rows.indices, rows.data.astype(np.uint32, copy=False))


@dataclass(frozen=True, eq=False)
class FilePiece:
    """Rows of a matrix of a file.

    Attributes
    ----------
    source
        The file, without its annotation.
    matrix
        Name of the matrix.
    start, stop
        Rows of the file.
    offset
        Rows of all inputs before this file.
    number
        Place of the file among the inputs.
    rounding, seed
        How values become integers.
    genes
        .npy file with the gene map.
    """

    source: Source
    matrix: str
    start: int
    stop: int
    offset: int
    number: int
    rounding: Rounding
    seed: int
    genes: Path

    @property
    def rows(self) -> int:
        """See :class:`Piece`."""
        return self.stop - self.start

    @property
    def what(self) -> str:
        """See :class:`Piece`."""
        return str(self.source.path)

    def gene_map(self) -> I64:
        """See :class:`Piece`."""
        return np.load(self.genes)

    def blocks(self) -> Iterator[Block]:
        """See :class:`Piece`."""
        for start, block in self.source.iterate(self.matrix, start=self.start, stop=self.stop):
            counts = self._integers(block, start)
            yield Block(self.offset + start, block.indptr.astype(np.int64), block.indices, counts)

    def _integers(self, block: sp.csr_matrix, start: int) -> NDArray[np.uint32]:
        """Return the values of rows from ``start`` on as integers.

        Values that are no integers are rounded as report and manifest say. Stochastic rounding draws by row and column,
        so the result does not depend on how the file is cut.
        """
        values = block.data
        if self.rounding == "nearest":
            values = np.rint(values.astype(np.float64))
        elif self.rounding == "stochastic":
            rows = start + np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
            draw = hash_keys(self.seed, self.number, rows, block.indices) >> np.uint64(11)
            values = np.floor(values.astype(np.float64) + draw.astype(np.float64) * 2.0**-53)
        with np.errstate(invalid="ignore"):  # what is no number is found below
            counts = values.astype(np.uint32)
        if self.rounding == "none" and not np.array_equal(counts, values):
            raise UserError(
                f"{self.what}: '{self.matrix}' is not what was checked: it holds values that are no counts."
            )
        return counts


def cut_rows(counts: CountRows) -> list[Piece]:
    """Cut what is in memory into pieces."""
    step = 8 * BLOCK_ROWS
    return [RowsPiece(counts, start, min(start + step, counts.shape[0])) for start in range(0, counts.shape[0], step)]


def cut_file(source: Source, file: FileReport, *, number: int, offset: int, seed: int, genes: Path) -> list[Piece]:
    """Cut a file into pieces of about :data:`PIECE_VALUES` values, or into one if each would have to read all of it."""
    about = source.matrices[file.matrix]
    values = about.shape[0] * about.shape[1] if about.stored < 0 else about.stored
    step = source.rows_per_pass(file.matrix) or max(1, int(source.n_cells * PIECE_VALUES / max(values, 1)))
    bare = replace(source, obs=pd.DataFrame(index=pd.RangeIndex(source.n_cells)), variables={}, uns={})
    return [
        FilePiece(
            bare, file.matrix, start, min(start + step, source.n_cells), offset, number, file.rounding, seed, genes
        )
        for start in range(0, source.n_cells, step)
    ]
