"""Cells of a file or folder of any format, read a block at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.hub.directory import SavedModel
from bgen.names import keys
from bgen.tasks.blocks.cells import BlockCells
from bgen.tasks.blocks.folder import Writer
from bgen.tasks.columns import as_labels, match_columns
from bgen.tasks.user_cells import FoundCounts, Reading
from data_tools.inputs.source import Source

NEAR = 4_096
"""Wanted cells that lie nearer to each other than this are read with those between."""

MOST_RUNS = 64
"""Runs of such cells that are read one by one; for more, the file is read from the first to the last."""


class FileCells(BlockCells):
    """Cells of a file or folder of any format that ``bgen data check`` reads; obs is in memory, counts are not.

    Parameters
    ----------
    source
        The file.
    found
        Which matrix of it holds the counts.
    saved, expected, reading
        As for :class:`StoreCells`.

    Raises
    ------
    UserError
        If it has too few of the model's genes.
    """

    def __init__(
        self,
        source: Source,
        found: FoundCounts,
        saved: SavedModel,
        expected: NDArray[np.float32],
        reading: Reading,
    ) -> None:
        self._source, self._matrix, self.rounding = source, found.matrix, found.rounding
        self._match(saved, expected, found.genes, source.var(found.matrix), reading)
        self._found, where, _, said = match_columns(source.obs, saved.columns, saved.about.units)
        self._say(saved, found.matrix, found.genes, where, (*source.notes, *said))

    def __len__(self) -> int:
        return self._source.n_cells

    @property
    def columns(self) -> list[str]:
        """See :class:`BlockCells`."""
        return [str(name) for name in self._source.obs.columns]

    def codes(self, name: str, start: int, stop: int) -> NDArray[np.int64]:
        """See :class:`BlockCells`."""
        return self._found[name][start:stop] if name in self._found else np.full(stop - start, -1)

    def texts(self, column: str, start: int, stop: int) -> NDArray[np.str_]:
        """See :class:`BlockCells`."""
        return as_labels(self._source.obs[column].iloc[start:stop])

    def write_frame(self, group: Any, rows: int) -> None:
        """See :class:`BlockCells`; all of obs is written."""
        obs = self._source.obs.rename(columns=keys(self._source.obs.columns))
        try:
            anndata.io.write_elem(group, "obs", obs)
        except Exception as error:  # whatever anndata says of values that it does not know
            raise UserError(f"{self._source.path}: a column of obs cannot be written as zarr ({error}).") from None

    def write_rows(self, writer: Writer, start: int, stop: int) -> None:
        """See :class:`BlockCells`; nothing is left to be written."""

    def take(self, cells: I64) -> sp.csr_matrix:
        """See :class:`BlockCells`: cells that lie near each other are read together; many runs of them in one pass."""
        edges = [0, *(np.flatnonzero(np.diff(cells) > NEAR) + 1), len(cells)]
        edges = edges if len(edges) < MOST_RUNS else [0, len(cells)]
        parts = []
        for low, high in itertools.pairwise(edges):
            wanted = cells[low:high]
            for first, block in self._source.iterate(self._matrix, None, int(wanted[0]), int(wanted[-1]) + 1):
                inside = wanted[(wanted >= first) & (wanted < first + block.shape[0])]
                if len(inside):
                    parts.append(self._by_gene(block[inside - first])[0])
        return sp.csr_matrix(sp.vstack(parts, format="csr"))

    def _pieces(self, start: int, stop: int) -> Iterator[sp.csr_matrix]:
        for _, block in self._source.iterate(self._matrix, None, start, stop):
            yield block
