"""The order in which the cells of a store lie, found with little memory.

Axes: N cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order import groups
from bgen.order.keys import hash_keys
from data_tools.cells.mapped import room
from data_tools.cells.texts import ranges


def shuffled(split: NDArray[np.integer[Any]], population: NDArray[np.integer[Any]] | None, seed: int) -> I64:
    """Return int64 ``[N]``: the cells by split, then by population, in a keyed random order within it.

    That is ``np.lexsort((hash_keys(seed, np.arange(N)), population, split))``: cells are first put beside those of
    their split and population, and then sorted a part at a time.

    Parameters
    ----------
    split
        ``[N]``: not negative.
    population
        ``[N]``: -1 for none; None: there are none at all.
    """
    n = len(split)
    width = 1 if population is None or not n else int(population.max()) + 2

    def group(cells: slice | I64) -> I64:
        code = split[cells].astype(np.int64) * width
        return code if population is None else code + population[cells] + 1

    sizes = np.zeros((int(split.max(initial=0)) + 1) * width, np.int64)
    for part in groups.parts(n):
        sizes += np.bincount(group(part), minlength=len(sizes))
    edges = np.concatenate([[0], np.cumsum(sizes)])
    line, at = room(n, np.int64), edges[:-1].copy()
    for part in groups.parts(n):
        groups.place(group(part), np.arange(part.start, part.stop), at, line)

    for start, stop in _batches(edges):
        cells = line[start:stop]
        if stop - start <= groups.PART:
            some = np.array(cells)
            cells[:] = some[np.lexsort((hash_keys(seed, some), group(some)))]
        else:
            _sort_large(cells, seed)
    return line


def _batches(edges: I64) -> list[tuple[int, int]]:
    """Return where runs of whole groups begin and end: of one, or of at most :data:`bgen.order.groups.PART` cells."""
    found: list[tuple[int, int]] = []
    distinct = np.unique(edges)
    at = 0
    while at < len(distinct) - 1:
        last = int(np.searchsorted(distinct, distinct[at] + groups.PART, side="right")) - 1
        last = max(last, at + 1)
        found.append((int(distinct[at]), int(distinct[last])))
        at = last
    return found


def _sort_large(cells: I64, seed: int) -> None:
    """Sort the cells of one group by their keys, in place."""
    out, at = room(len(cells), np.int64), 0
    for some in ranges(len(cells), lambda part: hash_keys(seed, cells[part])):
        these = cells[some]
        out[at : at + len(these)] = these[np.argsort(hash_keys(seed, these), kind="stable")]
        at += len(these)
    for part in groups.parts(len(cells)):
        cells[part] = out[part]
