"""Cells that are read a block at a time, as counts of a model's genes.

However many cells there are, memory holds some thousand of them. Of a store that is all; of a file, its obs is in
memory, too. Batches begin at multiples of their size, so what is made of a cell does not depend on where reading began.

Axes: N cells of a batch, M columns of the matrix, G genes of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.data.run_ahead import run_ahead
from bgen.hub.directory import SavedModel
from bgen.tasks.blocks.folder import Writer
from bgen.tasks.gene_match import FLOOR, GeneMatch, by_gene, match_genes, too_few
from bgen.tasks.user_cells import Matched, Reading, UserCells, UserData
from data_tools.check.findings import Rounding
from data_tools.check.genes import Genes

WINDOW = 65_536
"""Cells whose columns are read at once."""

SOME, RUNS = 1_000, 16
"""Cells that a verb is scored on, and at how many places they lie."""

AHEAD = 2
"""Batches that a thread reads ahead."""


@dataclass(frozen=True)
class Batch:
    """Some cells, one after another.

    Attributes
    ----------
    first
        Number of the first of them.
    counts
        CSR float32 ``[N, G]`` of the model's genes.
    molecules
        Sum of all their counts, also of genes that the model does not know.
    """

    first: int
    counts: sp.csr_matrix
    molecules: float


class BlockCells(ABC):
    """Cells that are read a block at a time.

    Attributes
    ----------
    match
        Which of the model's genes they have.
    matched
        What was matched; ``molecules`` and ``values`` are known once all are read, and are not said here.
    """

    match: GeneMatch
    matched: Matched
    rounding: Rounding = "none"
    _named: NDArray[np.bool_]
    _saved: SavedModel
    _own: Genes

    @abstractmethod
    def __len__(self) -> int:
        """Return how many cells there are."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns of obs."""

    @abstractmethod
    def codes(self, name: str, start: int, stop: int) -> NDArray[np.int64]:
        """Return codes of a covariate of the model of the cells ``start:stop``, -1 where it is not known."""

    @abstractmethod
    def texts(self, column: str, start: int, stop: int) -> NDArray[np.str_]:
        """Return a column of obs of the cells ``start:stop`` as text; cells without a value have ""."""

    @abstractmethod
    def write_frame(self, group: Any, rows: int) -> None:
        """Write obs, or room for it in chunks of so many cells, into a zarr group."""

    @abstractmethod
    def write_rows(self, writer: Writer, start: int, stop: int) -> None:
        """Write what :meth:`write_frame` left room for, of the cells ``start:stop``."""

    @abstractmethod
    def _pieces(self, start: int, stop: int) -> Iterator[sp.csr_matrix]:
        """Yield the cells ``start:stop``, some at a time, ``[n, M]``."""

    @abstractmethod
    def take(self, cells: I64) -> sp.csr_matrix:
        """Return counts ``[N, G]`` of ascending cells."""

    def covariates(self, names: Mapping[str, int], start: int, stop: int) -> dict[str, NDArray[np.int64]]:
        """Return the codes of the model's covariates."""
        return {name: self.codes(name, start, stop) for name in names}

    def covariates_of(self, names: Mapping[str, int], cells: I64) -> dict[str, NDArray[np.int64]]:
        """Return the same for ascending cells, reading only those near them."""
        found = {name: np.full(len(cells), -1) for name in names}
        for window in np.unique(cells // WINDOW):
            low, high = np.searchsorted(cells, [window * WINDOW, (window + 1) * WINDOW])
            start, stop = int(cells[low]), int(cells[high - 1]) + 1
            for name, codes in self.covariates(names, start, stop).items():
                found[name][low:high] = codes[cells[low:high] - start]
        return found

    def some(self) -> UserCells:
        """Return about :data:`SOME` cells from all over, in memory, to score a verb on."""
        n = len(self)
        run = -(-SOME // RUNS)
        starts = np.unique(np.linspace(0, max(n - run, 0), RUNS).astype(np.int64))
        rows = np.unique(np.concatenate([np.arange(start, min(start + run, n)) for start in starts]))
        adata = AnnData(obs=pd.DataFrame(index=rows.astype(str)))
        about = self.matched
        data = UserData(adata, about.matrix, about.rounding, self._own, None, 0.0, ())
        codes: dict[str, NDArray[Any]] = {**self.covariates_of(self._saved.codec.covariates, rows)}
        genes = self._saved.genes["id"].tolist()
        return UserCells(data, genes, self.take(rows), codes, self.match.known, np.zeros(0, np.int64), about)

    def batches(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        """Yield the cells ``start:stop``, ``size`` at a time, read ahead by a thread; ``start`` is a multiple of it."""
        pieces = self._joined(start, stop, size)
        ahead: Any = run_ahead(lambda _: [next(pieces, None)], 0, AHEAD)
        with closing(ahead):
            for (batch,) in ahead:
                if batch is None:
                    return
                yield batch

    def _joined(self, start: int, stop: int, size: int) -> Iterator[Batch]:
        held: list[sp.csr_matrix] = []
        first, wanted = start, size
        for piece in self._pieces(start, stop):
            at = 0
            while at < piece.shape[0]:
                part = piece[at : at + wanted]
                held.append(part)
                at += part.shape[0]
                wanted -= part.shape[0]
                if not wanted:
                    yield self._batch(first, held)
                    held, first, wanted = [], first + size, size
        if held:
            yield self._batch(first, held)

    def _batch(self, first: int, parts: list[sp.csr_matrix]) -> Batch:
        rows = parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))
        return Batch(first, *self._by_gene(rows))

    def _by_gene(self, rows: sp.csr_matrix) -> tuple[sp.csr_matrix, float]:
        return by_gene(rows, self.match.of_column, len(self.match.known), self.rounding, self._named)

    def _match(
        self, saved: SavedModel, expected: NDArray[np.float32], genes: Genes, var: pd.DataFrame, reading: Reading
    ) -> None:
        """Match the genes to the model's.

        Raises
        ------
        UserError
            If the data has too few of them.
        """
        floor = reading.get("floor")
        floor = FLOOR if floor is None else floor
        self.match, self._saved, self._own = match_genes(saved.genes, genes, floor, expected), saved, genes
        self._named = genes.gene_map >= 0
        if self.match.held < floor or not self.match.known.any():
            column = reading.get("gene_column")
            raise too_few(saved.genes, genes, var, self.match, expected, floor=floor, gene_column=column)

    def _say(self, saved: SavedModel, matrix: str, genes: Genes, where: dict[str, str], notes: tuple[str, ...]) -> None:
        match = self.match
        self.matched = Matched(
            matrix=matrix,
            rounding=self.rounding,
            way=match.way,
            genes=match.enough,
            missing=saved.genes["id"][~match.known].tolist(),
            unknown=genes.ids[match.places < 0].tolist(),
            repeated=int((match.of_column >= 0).sum() - match.enough),
            molecules=1.0,
            missing_molecules=max(0.0, 1.0 - match.held),
            columns=where,
            absent=[name for name in saved.columns if name not in where],
            values={},
            notes=notes,
        )
