"""Weighted sampling over sources: small ones come more often, large ones less, in an order as exact as the plain one.

Source s with n_s of the N cells gets the share p_s = n_s^(1 / temperature) / sum of those: temperature 1 takes the
cells as they are, and a high temperature takes all sources alike. An epoch has N draws; t_s = p_s N of them, rounded so
that they add up to N, are of source s. The k-th cell of the source, in the order of the store, is drawn

    m_k = floor(((k + 1) t_s + c) / n_s) - floor((k t_s + c) / n_s)

times, where c < n_s is a keyed random phase of source and epoch. So the source is drawn t_s times in all, and two of
its cells differ by one draw at most. A draw lies in the chunk of its cell, so chunks, lanes and windows are those of
:mod:`bgen.order.cells`, and all draws of a cell within an epoch fall into one window.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.order.cells import ROWS, Epoch, Members, Order, Window
from bgen.order.keys import hash_keys, permutation

_PHASE = 3  # what a key is for, beside those of the plain order


def shares(sizes: I64, temperature: float) -> NDArray[np.float64]:
    """Return the share of each source of ``sizes`` cells; sources without any have none."""
    with np.errstate(divide="ignore"):
        logs = np.log(sizes.astype(np.float64)) / temperature
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


class WeightedOrder(Order):
    """The batches of one split, with sources drawn by weight (see :class:`bgen.order.cells.Order`).

    Parameters
    ----------
    members, batch, lanes, window, seed, name
        As for the plain order.
    sources
        int ``[N]``: source of each member, from 0 on.
    temperature
        At least 1; 1 is the plain order.
    """

    def __init__(
        self,
        members: Members,
        batch: int,
        lanes: int,
        window: int,
        seed: int,
        name: str,
        *,
        sources: NDArray[np.integer],
        temperature: float,
    ) -> None:
        super().__init__(members, batch, lanes, window, seed, name)
        if temperature < 1:
            raise UserError(f"The temperature of sampling over sources is at least 1, not {temperature:g}.")
        sizes = np.bincount(sources).astype(np.int64)
        self.sources, self.temperature = sources.astype(np.int32), temperature
        self.draws = _round(shares(sizes, temperature) * len(members), len(members))
        self._cells = np.maximum(sizes, 1)
        self._rank = _rank_within(self.sources, len(sizes))
        self._starts = np.concatenate([[0], members.ends])

    def multiplicities(self, epoch: int, first: int = 0, last: int | None = None) -> I64:
        """Return how often each of the members ``first:last`` is drawn in an epoch."""
        part = slice(first, len(self.members) if last is None else last)
        keys = hash_keys(*self._key, _PHASE, epoch, np.arange(len(self.draws)))
        phases = (keys % self._cells.astype(np.uint64)).astype(np.int64)
        return _draw(self.sources[part], self._rank[part], self.draws, self._cells, phases)

    def read_window(self, key: tuple[int, int, int]) -> Window:
        """See :class:`bgen.order.cells.Order`."""
        epoch_number, lane_number, number = key
        epoch, lane = self._epoch(epoch_number), self._lane(epoch_number, lane_number)
        low = int(epoch.lane_starts[lane_number] + lane.row_edges[number])
        high = int(epoch.lane_starts[lane_number] + lane.row_edges[number + 1])
        first, last = lane.chunk_edges[[number, number + 1]].tolist()
        places, chunks = [], epoch.chunks[first:last]
        for chunk in chunks.tolist():
            start, stop = int(self._starts[chunk]), int(self._starts[chunk + 1])
            places.append(np.repeat(np.arange(start, stop), self.multiplicities(epoch_number, start, stop)))
        # the window may begin and end within a chunk, whose other draws are another lane's
        before = int(epoch.ends[first - 1]) if first else 0
        part = slice(low - before, high - before)
        touched = np.unique(np.repeat(chunks, [len(place) for place in places])[part])
        line = np.concatenate([np.zeros(0, np.int64), *places])[part]
        cells = self.members.take(line[permutation(high - low, *self._key, ROWS, *key)])
        return Window(key, self.members.chunks[touched], cells)

    def _make_epoch(self, number: int) -> Epoch:
        plain = super()._make_epoch(number)
        per_chunk = np.add.reduceat(self.multiplicities(number), self._starts[:-1])
        return Epoch(plain.chunks, np.cumsum(per_chunk[plain.chunks]), plain.lane_starts)


def _round(amounts: NDArray[np.float64], total: int) -> I64:
    """Round to whole numbers that add up to ``total``: largest remainders up."""
    whole = np.floor(amounts).astype(np.int64)
    rest = np.argsort(-(amounts - whole), kind="stable")
    whole[rest[: total - int(whole.sum())]] += 1
    return whole


@numba.njit(cache=True, nogil=True)
def _rank_within(sources: NDArray[np.int32], n: int) -> I64:
    """Return int64 ``[N]``: how many members of the same source come before each."""
    seen = np.zeros(n, np.int64)
    rank = np.empty(len(sources), np.int64)
    for i in range(len(sources)):
        rank[i] = seen[sources[i]]
        seen[sources[i]] += 1
    return rank


@numba.njit(cache=True, nogil=True)
def _draw(sources: NDArray[np.int32], rank: I64, draws: I64, cells: I64, phases: I64) -> I64:
    found = np.empty(len(sources), np.int64)
    for i in range(len(sources)):
        s = sources[i]
        found[i] = ((rank[i] + 1) * draws[s] + phases[s]) // cells[s] - (rank[i] * draws[s] + phases[s]) // cells[s]
    return found
