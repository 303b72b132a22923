"""The cells that windows of trajectories need, read once and kept packed (:mod:`bgen.order.pools`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bgen.arrays import I64
from bgen.data.loader import TOGETHER, Chunks, CountReader
from bgen.data.packed import PackedBatch
from bgen.store.arena import Arena
from bgen.store.format.codec import ESCAPE


@dataclass(frozen=True, eq=False)
class Pool:
    """Cells in memory, as they lie in the store: about two bytes for a gene that a cell expresses.

    Attributes
    ----------
    wanted
        int64 ``[R]``: numbers of the cells that were asked for, ascending.
    found
        What was read: in place of cells that are damaged perhaps others (:mod:`bgen.data.skip_damage`).
    """

    wanted: I64
    found: Chunks

    def pick(self, cells: I64) -> Chunks:
        """Return cells of the pool, in the order given; a cell may come more than once."""
        at = np.searchsorted(self.wanted, cells)
        return Chunks(self.found.arena, self.found.slots, self.found.rows[at], self.found.cells[at], [])


def read_pools(reader: CountReader, wanted: Sequence[I64], stopped: Callable[[], bool] = lambda: False) -> list[Pool]:
    """Read several pools of cells, each ascending, a few chunks at a time; a chunk that several need is read once.

    Parameters
    ----------
    stopped
        Asked before each part of the chunks.

    Raises
    ------
    InterruptedError
        If ``stopped`` says so.
    """
    chunks = np.unique(np.concatenate([np.searchsorted(reader.store.first_cell, c, side="right") - 1 for c in wanted]))
    parts: list[list[PackedBatch]] = [[] for _ in wanted]
    coming, arena = None, reader.store.arena(min(2 * TOGETHER, len(chunks)))
    for first in range(0, len(chunks) + TOGETHER, TOGETHER):
        if stopped():
            raise InterruptedError("reading was stopped")
        here, coming = coming, None
        if len(some := chunks[first : first + TOGETHER]):
            edges = reader.store.first_cell[[some[0], some[-1] + 1]]
            each = [cells[slice(*np.searchsorted(cells, edges))] for cells in wanted]
            coming = reader.start(some, np.concatenate(each), arena), np.cumsum([0, *map(len, each)])
        if here is None:
            continue
        loaded, ends = here
        for part, start, stop in zip(parts, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            if stop > start:
                part.append(_copy(reader.pack([(loaded, start, stop)], np.zeros(stop - start, np.int64), 0)))
        loaded.give_back()
    return [Pool(cells, _join(part)) for cells, part in zip(wanted, parts, strict=True)]


def _copy(batch: PackedBatch) -> PackedBatch:
    """Return a batch of its own memory, so that the reader's is used again at once."""
    batch.gaps, batch.counts, batch.pool, batch.obs = batch.gaps.clone(), batch.counts.clone(), None, {}
    return batch


def _join(parts: list[PackedBatch]) -> Chunks:
    """Return packed cells as rows of an arena of one slot, the overflow of all of them at its end; empties the list."""
    sizes = np.concatenate([_sizes(part) for part in parts])
    begins = np.cumsum(sizes, axis=0) - sizes
    n_gaps, n_counts, n_overflow = sizes.sum(0).tolist()
    begins[:, 2] = n_counts + 4 * begins[:, 2]
    cells = np.concatenate([part.cells.numpy() for part in parts])
    overflow = np.concatenate([part.overflow.numpy() for part in parts])
    arena = Arena(1, n_gaps, n_counts + 4 * n_overflow)
    arena.counts[0, n_counts:] = overflow.view(np.uint8)
    gaps = counts = 0
    while parts:
        part = parts.pop(0)
        arena.gaps[0, gaps : gaps + len(part.gaps)] = part.gaps.numpy()
        arena.counts[0, counts : counts + len(part.counts)] = part.counts.numpy()
        gaps, counts = gaps + len(part.gaps), counts + len(part.counts)
    rows = np.stack([begins, sizes], axis=2).reshape(len(sizes), 6)
    return Chunks(arena, np.zeros(0, np.int64), rows, cells, [])


def _sizes(part: PackedBatch) -> I64:
    """Return int64 ``[B, 3]``: bytes of gaps and of counts, and entries of the overflow, of each cell."""
    indptr = part.indptr.numpy()
    large = np.flatnonzero(part.counts.numpy() == ESCAPE)
    return np.stack([np.diff(part.gap_start.numpy()), np.diff(indptr), np.diff(np.searchsorted(large, indptr))], axis=1)
