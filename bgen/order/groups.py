"""Rows grouped by columns, with little memory: a part of the rows is looked at at a time, and nothing of all is kept.

Axes: n rows, P groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64

PART = 1 << 20
"""Rows that are looked at at a time."""

TEXTS = 1 << 17
"""Rows of texts that are looked at at a time: as Python objects they take some 100 bytes each."""

Rows = slice | I64
Column = Callable[[Rows], NDArray[Any]]
"""Returns the values of some rows."""


class Groups:
    """The distinct combinations of some columns, and the rows that have each.

    Parameters
    ----------
    columns
        The first one is the primary key: groups ascend by it, then by the second, and so on.
    n
        Rows.
    known
        Returns which of some rows, bool, belong to a group; None: all.

    Attributes
    ----------
    edges
        int64 ``[P + 1]``: groups take ``edges[p]:edges[p + 1]`` of the line of rows that :meth:`fill` writes.
    first
        int64 ``[P]``: the first row of each.
    """

    def __init__(self, columns: Sequence[Column], n: int, known: Column | None = None) -> None:
        self._columns, self._n, self._known = columns, n, known
        self._values: list[NDArray[Any]] = []
        self._combined: list[I64] = []
        for depth, column in enumerate(columns):
            self._values.append(_distinct(column(rows) for rows in self._parts()))
            self._combined.append(_distinct(self._combine(rows, depth) for rows in self._parts()))
        sizes = np.zeros(len(self._combined[-1]) if columns else 1, np.int64)
        self.first = np.full(len(sizes), n, np.int64)
        for rows in self._parts():
            codes = self.codes(rows)
            sizes += np.bincount(codes, minlength=len(sizes))
            there, where = np.unique(codes, return_index=True)
            self.first[there] = np.minimum(self.first[there], _number(rows, where))
        self.edges = np.concatenate([[0], np.cumsum(sizes)]) if sizes.sum() else np.zeros(1, np.int64)
        self.first = self.first[: len(self.edges) - 1]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def codes(self, rows: Rows) -> I64:
        """Return the number of the group of each of some rows, all of which are known."""
        if not self._columns:
            return np.zeros(_length(rows), np.int64)
        return np.searchsorted(self._combined[-1], self._combine(rows, len(self._columns) - 1))

    def fill(self, line_out: NDArray[np.integer[Any]], numbers: Callable[[Rows], I64]) -> None:
        """Write the ``numbers`` of the rows, group by group, ascending within each."""
        at = self.edges[:-1].copy()
        for rows in self._parts():
            place(self.codes(rows), numbers(rows), at, line_out)

    def count(self, which: Column) -> I64:
        """Return int64 ``[P]``: how many rows of each group are among those for which ``which`` is true."""
        found = np.zeros(len(self), np.int64)
        for rows in self._parts():
            found += np.bincount(self.codes(rows)[which(rows)], minlength=len(found))
        return found

    def _combine(self, rows: Rows, depth: int) -> I64:
        """Return a number of the combination of the columns up to ``depth``, ascending with them."""
        code = np.searchsorted(self._values[0], self._columns[0](rows))
        for level in range(1, depth + 1):
            code = np.searchsorted(self._combined[level - 1], code)
            code = code * len(self._values[level]) + np.searchsorted(self._values[level], self._columns[level](rows))
        return code

    def _parts(self) -> Iterator[Rows]:
        for part in parts(self._n):
            rows: Rows = part
            if self._known is not None and not (known := self._known(part)).all():
                rows = part.start + np.flatnonzero(known)
            if _length(rows):
                yield rows


def parts(n: int, most: int | None = None) -> Iterator[slice]:
    """Yield consecutive parts of ``n`` rows, of :data:`PART` each, or of ``most`` if that is less."""
    size = PART if most is None else min(PART, most)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _distinct(parts: Iterator[NDArray[Any]]) -> NDArray[Any]:
    """Return the distinct values of some arrays, ascending."""
    found: NDArray[Any] | None = None
    for part in parts:
        some = np.unique(part)
        found = some if found is None else np.unique(np.concatenate([found, some]))
    return np.zeros(0, np.int64) if found is None else found


def _length(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _number(rows: Rows, where: I64) -> I64:
    return rows.start + where if isinstance(rows, slice) else rows[where]


@numba.njit(cache=True, nogil=True)
def place(codes: I64, numbers: I64, at: I64, line_out: NDArray[np.integer[Any]]) -> None:
    """Write each number where the numbers of its code go on: at ``at[code]``, which is moved on."""
    for row in range(len(codes)):
        line_out[at[codes[row]]] = numbers[row]
        at[codes[row]] += 1
