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

MARKS = 1 << 26
"""Bytes of the numbers k that are kept, or one for each cell if that is more; those between are counted again."""


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
        Whole numbers ``[N]`` that tell the source of each member; held as they are.
    temperature
        At least 1; 1 is the plain order.
    source_of
        int64: number of the source, from 0 on, by the value in ``sources``, the last entry for -1; None: the values
        are the numbers.

    Attributes
    ----------
    draws
        int64: draws of each source in an epoch.
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
        source_of: I64 | None = None,
    ) -> None:
        super().__init__(members, batch, lanes, window, seed, name)
        if temperature < 1:
            raise UserError(f"The temperature of sampling over sources is at least 1, not {temperature:g}.")
        self.sources, self.temperature = sources, temperature
        self._source_of = np.arange(int(sources.max()) + 1) if source_of is None else source_of
        self._starts = np.concatenate([[0], members.ends])
        n = int(self._source_of.max()) + 1
        self._step = max(1, -(-8 * n * len(members.chunks) // max(MARKS, len(members))))
        self._seen = np.zeros((-(-len(members.chunks) // self._step), n), np.int64)
        sizes = _count(self.sources, self._source_of, self._starts, self._step, self._seen)
        self.draws = _round(shares(sizes, temperature) * len(members), len(members))
        self._cells = np.maximum(sizes, 1)

    def multiplicities(self, epoch: int, first: int = 0, last: int | None = None) -> I64:
        """Return how often each of the members ``first:last`` is drawn in an epoch."""
        found = np.empty((len(self.members) if last is None else last) - first, np.int64)
        mark = (int(np.searchsorted(self._starts, first, side="right")) - 1) // self._step
        seen, before = self._seen[mark].copy(), int(self._starts[mark * self._step])
        of = self.draws, self._cells, self._phases(epoch), seen
        _draw(self.sources[before : first + len(found)], self._source_of, *of, first - before, found)
        return found

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
        seen = np.zeros(len(self.draws), np.int64)
        of = self.draws, self._cells, self._phases(number), seen
        per_chunk = _draw_of_chunks(self.sources, self._source_of, *of, self._starts)
        return Epoch(plain.chunks, np.cumsum(per_chunk[plain.chunks]), plain.lane_starts)

    def _phases(self, epoch: int) -> I64:
        keys = hash_keys(*self._key, _PHASE, epoch, np.arange(len(self.draws)))
        return (keys % self._cells.astype(np.uint64)).astype(np.int64)


def _round(amounts: NDArray[np.float64], total: int) -> I64:
    """Round to whole numbers that add up to ``total``: largest remainders up."""
    whole = np.floor(amounts).astype(np.int64)
    rest = np.argsort(-(amounts - whole), kind="stable")
    whole[rest[: total - int(whole.sum())]] += 1
    return whole


@numba.njit(cache=True, nogil=True)
def _count(sources: NDArray[np.integer], source_of: I64, starts: I64, step: int, seen_out: I64) -> I64:
    """Return how many members each source has; ``seen_out [marks, S]``: how many before every ``step``-th chunk."""
    seen = np.zeros(seen_out.shape[1], np.int64)
    for chunk in range(len(starts) - 1):
        if chunk % step == 0:
            seen_out[chunk // step] = seen
        for i in range(starts[chunk], starts[chunk + 1]):
            seen[source_of[sources[i]]] += 1
    return seen


@numba.njit(cache=True, nogil=True)
def _draws_of(k: int, draws: int, phase: int, cells: int) -> int:
    """Return how often the k-th cell of a source is drawn, m_k."""
    return ((k + 1) * draws + phase) // cells - (k * draws + phase) // cells


@numba.njit(cache=True, nogil=True)
def _draw(
    sources: NDArray[np.integer],
    source_of: I64,
    draws: I64,
    cells: I64,
    phases: I64,
    seen: I64,
    first: int,
    found: I64,
) -> None:
    """Write how often the members from ``first`` on are drawn; ``seen [S]``: members before all of them, updated."""
    for i in range(len(sources)):
        s = source_of[sources[i]]
        if i >= first:
            found[i - first] = _draws_of(seen[s], draws[s], phases[s], cells[s])
        seen[s] += 1


@numba.njit(cache=True, nogil=True)
def _draw_of_chunks(
    sources: NDArray[np.integer], source_of: I64, draws: I64, cells: I64, phases: I64, seen: I64, starts: I64
) -> I64:
    """Return how often the members of each chunk are drawn, together."""
    found = np.zeros(len(starts) - 1, np.int64)
    for chunk in range(len(starts) - 1):
        for i in range(starts[chunk], starts[chunk + 1]):
            s = source_of[sources[i]]
            found[chunk] += _draws_of(seen[s], draws[s], phases[s], cells[s])
            seen[s] += 1
    return found
