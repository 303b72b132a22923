"""Mean expression of groups of cells, and how well it is known: all that average effects are estimated from.

A group is the cells of one context (a cell type, a donor, a replicate: what cells are compared within) under one label
(what was done to them, with its dose; or nothing). Sums are added up a batch at a time, so a store can be streamed
through :class:`Accumulator` and nothing but sums is kept.

Axes: N cells, G genes, Q groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import F64, I64
from bgen.genes.expression import TARGET_SUM

CONTROL = -1
"""Label of control cells."""

LEAST_MOLECULES = 0.5
"""No mean is known better than by so many molecules in all cells of the group: a gene that none of them shows may be
expressed."""

_ROWS = 256
"""Groups of a batch whose sums are dense at a time."""


@dataclass(frozen=True)
class GroupMoments:
    """Groups of cells in the order of their contexts and labels.

    Attributes
    ----------
    context, label
        Numbers ``[Q]``; label -1: control cells.
    cells
        How many each has ``[Q]``.
    mean
        Counts per 10,000 of the average cell ``[Q, G]``, every cell with the same weight.
    variance
        Of that mean, from how cells of the group differ ``[Q, G]``.
    """

    context: I64
    label: I64
    cells: I64
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]

    def some(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> GroupMoments:
        """Return some of the groups."""
        return GroupMoments(
            self.context[rows], self.label[rows], self.cells[rows], self.mean[rows], self.variance[rows]
        )

    def pooled(self) -> tuple[F64, F64]:
        """Return mean and its variance ``[G]`` of the cells of all groups together."""
        share = self.cells / max(int(self.cells.sum()), 1)
        return share @ self.mean.astype(np.float64), share**2 @ self.variance.astype(np.float64)


class Accumulator:
    """Adds up cells of ``genes`` genes, a batch at a time, in any order.

    Several processes may each add a share of the cells: with the same ``groups`` (context and label of each) from the
    start, their :attr:`sums` can be added.
    """

    def __init__(self, genes: int, groups: Sequence[tuple[int, int]] = ()) -> None:
        self._place = {group: number for number, group in enumerate(groups)}
        self._cells = np.zeros(len(groups), np.int64)
        self._molecules = np.zeros(len(groups))
        self._sums, self._squares = np.zeros((2, len(groups), genes))

    @property
    def sums(self) -> list[NDArray[Any]]:
        """What was added up, to be changed in place."""
        return [self._cells, self._molecules, self._sums, self._squares]

    def add(self, counts: sp.csr_matrix, context: I64, label: I64) -> None:
        """Add cells: counts ``[N, G]``, and context and label of each ``[N]``."""
        keys = np.stack([np.asarray(context, np.int64), np.asarray(label, np.int64)], axis=1)
        found, code = np.unique(keys, axis=0, return_inverse=True)
        rows = np.array([self._place.setdefault((int(a), int(b)), len(self._place)) for a, b in found], np.int64)
        self._grow(len(self._place))
        library = np.asarray(counts.sum(1, dtype=np.float64)).ravel()
        scaled = sp.diags(TARGET_SUM / np.maximum(library, 1.0)) @ counts.astype(np.float64)
        member = sp.csr_matrix((np.ones(len(code)), (code.ravel(), np.arange(len(code)))), (len(found), len(code)))
        sums, squares = (member @ scaled).tocsr(), (member @ scaled.multiply(scaled)).tocsr()
        self._cells[rows] += np.bincount(code.ravel(), minlength=len(found))
        self._molecules[rows] += np.bincount(code.ravel(), library, len(found))
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            self._sums[rows[part]] += sums[part].toarray()
            self._squares[rows[part]] += squares[part].toarray()

    def finish(self) -> GroupMoments:
        """Return the moments of what was added.

        A group of one cell has the variance of an average cell of the other groups.
        """
        keys = np.array(list(self._place), np.int64).reshape(-1, 2)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        n = self._cells[order, None].astype(np.float64)
        mean = self._sums[order] / np.maximum(n, 1)
        within = np.maximum(self._squares[order] - n * mean**2, 0)
        free = np.maximum(n - 1, 0)
        average = within.sum(0) / max(float(free.sum()), 1.0)
        if not free.any() and len(n) > 1:  # nothing is known within groups
            average = mean.var(0, ddof=1)
        variance = np.where(free > 0, within / np.maximum(free, 1), average) / np.maximum(n, 1)
        least = LEAST_MOLECULES * TARGET_SUM / np.maximum(self._molecules[order, None], 1.0)
        return GroupMoments(
            context=keys[order, 0],
            label=keys[order, 1],
            cells=self._cells[order],
            mean=mean.astype(np.float32),
            variance=(variance + least**2).astype(np.float32),
        )

    def _grow(self, size: int) -> None:
        more = size - len(self._cells)
        if more:
            self._cells = np.pad(self._cells, (0, more))
            self._molecules = np.pad(self._molecules, (0, more))
            self._sums, self._squares = (np.pad(old, ((0, more), (0, 0))) for old in (self._sums, self._squares))


def moments_of(counts: sp.csr_matrix, context: I64, label: I64) -> GroupMoments:
    """Return the moments of cells: counts ``[N, G]``, and context and label (-1: control) of each ``[N]``."""
    sums = Accumulator(counts.shape[1])
    sums.add(counts, context, label)
    return sums.finish()
