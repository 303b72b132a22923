"""A sample of many cells that is cheap to read: cells of few chunks, the same for every rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.cells import Cells, numbers
from bgen.order.keys import hash_keys, permutation

SCATTERED = 8
"""Times as many cells as are wanted, up to which they are taken one by one: no more than these are decoded."""

PART = 64
"""Cells that are taken from a chunk where neighbours may be alike."""


def sample(cells: Cells, n: int, first_cell: I64, *key: int, whole: bool = False) -> I64:
    """Return min(n, all) of some cells of a store, ascending, that belong to ``key``; each is equally likely.

    Reading a cell decodes its chunk. From more than :data:`SCATTERED` times n cells, chunks are drawn, and the same
    share of the cells of each: all of them, or, where neighbours may be alike, about :data:`PART` of a full one.

    Parameters
    ----------
    cells
        ``[N]``, ascending.
    first_cell
        int64 ``[C + 1]``: first cell of each chunk of the store, and the number of all.
    whole
        Take whole chunks: their cells are in random order.
    """
    if len(cells) <= n:
        return numbers(cells)
    if len(cells) <= SCATTERED * n:
        line = numbers(cells)
        return np.sort(line[np.argsort(hash_keys(*key, line))[:n]])
    if isinstance(cells, range):
        ends = np.clip(first_cell, cells.start, cells.stop) - cells.start
    else:
        ends = np.searchsorted(cells, first_cell)
    ends = ends[np.append(True, np.diff(ends) > 0)]  # of the chunks that hold any
    sizes = np.diff(ends)
    share = 1.0 if whole else min(1.0, max(PART / int(sizes.max()), 2 * n / len(cells)))
    order = permutation(len(sizes), *key)
    # rounded up as often as is right
    kept = (share * sizes + _uniform(hash_keys(*key, -1, np.arange(len(sizes))))).astype(np.int64)
    # the chosen ones of all chunks in random order are a ring, of which n in a row are as likely as any others
    edges = np.append(0, np.cumsum(kept[order]))
    start = int(_uniform(hash_keys(*key, -2)) * edges[-1])
    taken: list[I64] = []
    for low, high in ((start, min(start + n, edges[-1])), (0, start + n - edges[-1])):
        for at in range(int(np.searchsorted(edges, low, side="right")) - 1, int(np.searchsorted(edges, high))):
            chunk = order[at]
            some = numbers(cells[int(ends[chunk]) : int(ends[chunk + 1])])
            line = some[np.argsort(hash_keys(*key, some))[: kept[chunk]]]
            taken.append(line[max(0, low - edges[at]) : high - edges[at]])
    return np.sort(np.concatenate(taken))


def _uniform(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return numbers from 0 up to 1."""
    return np.asarray((keys >> np.uint64(11)) * 2.0**-53, np.float64)
