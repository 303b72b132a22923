"""Which cells belong to which step: a pure function of store, split, seed and step.

The stream of training is an endless line of positions ``j``; step ``s`` takes positions ``s * B .. (s + 1) * B - 1``,
so position ``j`` fills slot ``j mod B`` of its batch, and epoch ``e`` is the positions ``e * N .. (e + 1) * N - 1``,
with N cells in the split. The slots of a batch are dealt to L lanes side by side, and a rank takes a contiguous slice
of slots.

An epoch lays the split's chunks in a keyed random order and cuts the line of their cells into one segment per lane,
each as long as the number of the epoch's positions whose slots belong to the lane. A lane walks through its segment in
windows of W chunks and, within a window, in a keyed random order of its cells. So every cell of the split comes once an
epoch, every batch is full, epochs follow each other without a gap, and the lanes of a rank are the only ones whose
chunks it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.keys import hash_text, permutation

CHUNKS, ROWS = 1, 2  # what a key is for

Cells = I64 | range
"""Numbers of cells, ascending: an array, or a range, which takes no memory."""


def numbers(cells: Cells) -> I64:
    """Return the numbers of cells as an array."""
    return np.arange(cells.start, cells.stop) if isinstance(cells, range) else cells


def pick(values: NDArray[Any], cells: Cells) -> NDArray[Any]:
    """Return the values of some cells; of a range it is a view, which takes no memory."""
    return values[cells.start : cells.stop] if isinstance(cells, range) else values[cells]


@dataclass(frozen=True, eq=False)
class Members:
    """The cells of a split, grouped by the chunk that holds them.

    Attributes
    ----------
    chunks
        int64 ``[C]``: numbers of the chunks with at least one cell of the split, ascending.
    ends
        int64 ``[C]``: cells of the split in the chunks up to and including each.
    cells
        int64 ``[N]``: numbers of the cells, ascending; or the first one, if they are consecutive.
    """

    chunks: I64
    ends: I64
    cells: I64 | int

    @classmethod
    def of(cls, cells: Cells, first_cell: I64) -> Members:
        """Group cells by chunk; ``first_cell`` is int64 ``[n_chunks + 1]`` of the store."""
        if isinstance(cells, range):
            per_chunk = np.diff(np.clip(first_cell, cells.start, cells.stop))
        else:
            per_chunk = np.diff(np.searchsorted(cells, first_cell))
        chunks = np.flatnonzero(per_chunk)
        consecutive = len(cells) > 0 and int(cells[-1]) - int(cells[0]) + 1 == len(cells)
        return cls(chunks, np.cumsum(per_chunk[chunks]), int(cells[0]) if consecutive else numbers(cells))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def take(self, where: I64) -> I64:
        """Return the numbers of the cells at places ``where`` of the split."""
        return where + self.cells if isinstance(self.cells, int) else self.cells[where]


@dataclass(frozen=True, eq=False)
class Window:
    """One window of one lane: the chunks to read, and its cells in the order in which they are taken.

    Attributes
    ----------
    key
        (epoch, lane, number in the lane).
    chunks
        int64: numbers of the chunks in the store that hold them, each once.
    cells
        int64: numbers of the cells in the store, in order.
    """

    key: tuple[int, int, int]
    chunks: I64
    cells: I64


@dataclass(frozen=True)
class Run:
    """Consecutive slots of a batch that take cells ``start:stop`` of one window."""

    window: tuple[int, int, int]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Epoch:
    """Order of the chunks of one pass over the cells."""

    chunks: I64  # places in members.chunks, in this epoch's order
    ends: I64  # cells up to and including each of them
    lane_starts: I64  # [L + 1]: where the lanes' segments begin in the line of cells


@dataclass(frozen=True, eq=False)
class _Lane:
    chunk_edges: I64  # [windows + 1]: the epoch's chunks that each window touches
    row_edges: I64  # [windows + 1]: cells of the lane before each window


class Order:
    """The batches of one split of a store.

    Parameters
    ----------
    members
        Cells of the split.
    batch
        B, cells per global batch.
    lanes
        L. The order depends on it, so it is kept with the run.
    window
        W, chunks per window.
    seed
        Seed of the order.
    name
        What distinguishes this order from another of the same seed: store fingerprint and split.
    """

    def __init__(self, members: Members, batch: int, lanes: int, window: int, seed: int, name: str) -> None:
        if len(members) == 0:
            raise ValueError(f"There are no cells to order in {name}.")
        self.members = members
        self.batch = batch
        self.lanes = min(lanes, batch)
        self.window = window
        self._key = (seed, hash_text(name))
        self._slots = np.arange(self.lanes + 1) * batch // self.lanes  # lane l owns slots [l]:[l + 1]
        self._sizes = np.diff(np.concatenate([[0], members.ends]))
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._lane = lru_cache(maxsize=4 * self.lanes)(self._make_lane)

    def cells(self, step: int, start: int = 0, stop: int | None = None) -> I64:
        """Return the numbers of the cells in slots ``start:stop`` of a step's global batch."""
        return np.concatenate(
            [self.read_window(run.window).cells[run.start : run.stop] for run in self.runs(step, start, stop)]
        )

    def runs(self, step: int, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """Yield, slot by slot, which cells of which windows fill slots ``start:stop`` of a step's global batch."""
        j = step * self.batch + start
        end = step * self.batch + (self.batch if stop is None else stop)
        while j < end:
            epoch, slot = j // len(self.members), j % self.batch
            lane = int(np.searchsorted(self._slots, slot, side="right")) - 1
            # consecutive positions of one epoch, one batch and one lane are consecutive cells of the lane
            until = min(end, (epoch + 1) * len(self.members), j - slot + int(self._slots[lane + 1]))
            first = self._before(j, lane) - self._before(epoch * len(self.members), lane)
            yield from self._windows_of(epoch, lane, first, first + until - j)
            j = until

    def read_window(self, key: tuple[int, int, int]) -> Window:
        """Return the chunks and the ordered cells of a window."""
        epoch_number, lane_number, number = key
        epoch, lane = self._epoch(epoch_number), self._lane(epoch_number, lane_number)
        low = epoch.lane_starts[lane_number] + lane.row_edges[number]
        high = epoch.lane_starts[lane_number] + lane.row_edges[number + 1]
        line = low + permutation(int(high - low), *self._key, ROWS, *key)
        at = np.searchsorted(epoch.ends, line, side="right")  # which of the epoch's chunks
        chunk = epoch.chunks[at]
        back = epoch.ends[at] - line  # cells from here to the chunk's end, at least 1
        cells = self.members.take(self.members.ends[chunk] - back)
        touched = epoch.chunks[lane.chunk_edges[number] : lane.chunk_edges[number + 1]]
        return Window(key, self.members.chunks[touched], cells)

    def next_window(self, key: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the window that the lane walks through after ``key``."""
        epoch, lane, number = key
        if number + 2 < len(self._lane(epoch, lane).row_edges):
            return epoch, lane, number + 1
        epoch += 1
        while len(self._lane(epoch, lane).row_edges) < 2:  # an epoch smaller than a batch may not reach every lane
            epoch += 1
        return epoch, lane, 0

    def _before(self, position: int, lane: int) -> int:
        """Return how many positions before ``position`` have a slot of the lane."""
        low, high = int(self._slots[lane]), int(self._slots[lane + 1])
        batches, slot = divmod(position, self.batch)
        return batches * (high - low) + min(max(slot - low, 0), high - low)

    def _make_epoch(self, number: int) -> Epoch:
        chunks = permutation(len(self.members.chunks), *self._key, CHUNKS, number)
        n = len(self.members)
        lengths = [self._before((number + 1) * n, lane) - self._before(number * n, lane) for lane in range(self.lanes)]
        return Epoch(chunks, np.cumsum(self._sizes[chunks]), np.concatenate([[0], np.cumsum(lengths)]))

    def _make_lane(self, epoch_number: int, number: int) -> _Lane:
        epoch = self._epoch(epoch_number)
        low, high = epoch.lane_starts[number], epoch.lane_starts[number + 1]
        first = int(np.searchsorted(epoch.ends, low, side="right"))
        last = int(np.searchsorted(epoch.ends, high, side="left")) + 1 if high > low else first
        # the lanes' first windows differ in size, so that the lanes do not all turn a page at the same step
        edges = [first]
        size = self._first_size(number)
        while edges[-1] < last:
            edges.append(min(edges[-1] + size, last))
            size = self.window
        chunk_edges = np.array(edges)
        rows = np.where(chunk_edges > 0, epoch.ends[np.maximum(chunk_edges, 1) - 1], 0)
        return _Lane(chunk_edges, np.clip(rows, low, high) - low)

    def _first_size(self, lane: int) -> int:
        return max(1, self.window * (lane + 1) // self.lanes)

    def _windows_of(self, epoch: int, lane: int, start: int, stop: int) -> Iterator[Run]:
        edges = self._lane(epoch, lane).row_edges
        number = int(np.searchsorted(edges, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(edges[number + 1]))
            yield Run((epoch, lane, number), start - int(edges[number]), end - int(edges[number]))
            start, number = end, number + 1
