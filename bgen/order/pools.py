"""Trajectories that share the cells that are read: a pure function of (store, split, seed, step), as every order.

A chunk of a store holds some 256 cells, and one draw of a population takes few of them. So draws are dealt in
**windows**, and what a window needs is read once, its **pool**. A window holds V trajectories, each of which it draws k
times. A population that the window draws u times takes a run of u N neighbours in its line of shuffled cells
(:func:`bgen.order.trajectories.Trajectories.neighbours`), and the run is dealt to its draws in a keyed random order: no
cell comes a second time before the run is used up. All populations of a window begin the same share of the way along
their lines, which is random; so each of their cells is equally likely, and those of populations that share chunks lie
in the same chunks.

The windows are those of :mod:`bgen.order.cells`, with a trajectory for a chunk and a draw for a cell: an epoch deals
the trajectories to lanes, in a keyed random order, each of them equally often; a lane shuffles the draws of a window.
Hence the same batches for any number of ranks, each of which reads the windows of its own lanes.

k is the least with which at most :data:`DECODED` cells are decoded for one that is used; or the best one, where none
does. That depends on how the populations lie in the store, which is measured in one window.

Axes: S trajectories, V trajectories of a window, T time points, N cells per time point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from bgen.arrays import I64
from bgen.order.cells import CHUNKS, Epoch, Members, Order, Run
from bgen.order.keys import hash_keys, permutation
from bgen.order.trajectories import GridOfCells, Trajectories, TrajectoryOrder, share_of_way

_AT, _RUN, _DEAL = 8, 9, 10  # what a key is for
_EPOCH = 1 << 40
"""Draws of an epoch, at most: what one is drawn for is its epoch and its number in it."""

DECODED = 3.0
"""Cells that are decoded for one that is used, where a choice of k allows it."""

DRAWS = (1, 2, 4, 8, 16, 32)
"""What k is chosen from."""

Key = tuple[int, int, int]


class _Turns(Order):
    """An order in which ``n`` chunks come in random order, then the next ``n``, and so on, until an epoch is over.

    All lanes turn their pages at the same step, about.
    """

    def __init__(self, members: Members, batch: int, lanes: int, window: int, seed: int, name: str, *, n: int) -> None:
        super().__init__(members, batch, lanes, window, seed, name)
        self._n = n

    def _first_size(self, lane: int) -> int:
        return self.window

    def _make_epoch(self, number: int) -> Epoch:
        turns = range(len(self.members.chunks) // self._n)
        chunks = [turn * self._n + permutation(self._n, *self._key, CHUNKS, number, turn) for turn in turns]
        return replace(super()._make_epoch(number), chunks=np.concatenate(chunks))  # all are of one size


@dataclass(frozen=True, eq=False)
class PoolWindow:
    """One window of one lane.

    Attributes
    ----------
    cells
        int64: the cells that it needs, ascending.
    grids
        Its draws, in the order in which they are taken.
    """

    cells: I64
    grids: list[GridOfCells]

    def decoded(self, first_cell: I64) -> float:
        """Return how many cells are decoded for one place that holds a cell; ``first_cell [C + 1]`` is the store's."""
        chunks = np.unique(np.searchsorted(first_cell, self.cells, side="right") - 1)
        return float(np.diff(first_cell)[chunks].sum() / sum(grid.mask.sum() for grid in self.grids))


class PooledTrajectories(TrajectoryOrder):
    """The trajectories of every step, drawn from pools.

    Parameters
    ----------
    trajectories, batch, times, cells, seed, name
        As for :class:`bgen.order.trajectories.TrajectoryOrder`.
    lanes
        Lanes that an epoch is dealt to; the order depends on it.
    pool
        Different cells of a window, at most, about; more if one trajectory needs more.
    first_cell
        int64 ``[C + 1]``: first cell of each chunk of the store, and the number of all.

    Attributes
    ----------
    draws
        k.
    decoded
        Cells that are decoded for one that is used, about, by a rank of one lane; others decode less.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        batch: int,
        times: int,
        cells: int,
        seed: int,
        name: str,
        *,
        lanes: int,
        pool: int,
        first_cell: I64,
    ) -> None:
        super().__init__(trajectories, batch, times, cells, seed, name)
        self.lanes, self.pool = min(lanes, batch), pool
        self._lengths = np.array([len(points) for points in trajectories.points])
        self._sizes = np.diff(trajectories.edges)[np.concatenate(trajectories.points)]
        measured: dict[int, float] = {}
        for self.draws in DRAWS:
            self._deal()
            window = self.window((0, self.lanes - 1, 0))
            if measured and len(window.cells) > 2 * pool:  # a single trajectory needs more than there is room for
                break
            measured[self.draws] = window.decoded(first_cell)
            if measured[self.draws] <= DECODED:
                break
        if measured.get(self.draws, np.inf) > DECODED:
            self.draws = min(measured, key=lambda k: (measured[k], k))
            self._deal()
        self.decoded = measured[self.draws]

    def _deal(self) -> None:
        """Deal draws to windows, ``self.draws`` of a trajectory at a time."""
        S, most = len(self.trajectories), self.draws * self.cells
        needed = np.add.reduceat(np.minimum(self._sizes, most), np.cumsum(self._lengths) - self._lengths)
        self._run = min(1 / self.lanes, float(needed.sum() / self._sizes.sum()))  # share of a population, about
        mean = float((needed / self._lengths * np.minimum(self._lengths, self.times)).mean())
        width = min(S, max(1, int(self.pool / mean)))
        # few trajectories take several turns an epoch, so that the windows of all lanes are full
        turns = max(-(-self.lanes * width // S), -(-self.batch // (S * self.draws)))
        # windows of one size, about; a lane may begin and end within the draws of a trajectory
        windows = max(1, round(S * turns / (self.lanes * width)))
        self._width = -(-(S * turns + self.lanes) // (self.lanes * windows))
        members = Members(np.arange(S * turns), self.draws * np.arange(1, S * turns + 1), 0)
        self._order = _Turns(members, self.batch, self.lanes, self._width, self.seed, f"{self.name}/pools", n=S)
        self.window = lru_cache(maxsize=2 * self.lanes + 4)(self._draw_window)

    def runs(self, step: int, start: int = 0, stop: int | None = None) -> list[Run]:
        """Return which draws of which windows fill slots ``start:stop`` of a step's global batch."""
        return list(self._order.runs(step, start, stop))

    def next_window(self, key: Key) -> Key:
        """Return the window that the lane walks through after ``key``."""
        return self._order.next_window(key)

    def read(self, step: int, start: int = 0, stop: int | None = None) -> list[GridOfCells]:
        """Return the trajectories in slots ``start:stop`` of a step's global batch."""
        runs = self.runs(step, start, stop)
        return [grid for run in runs for grid in self.window(run.window).grids[run.start : run.stop]]

    def _draw_window(self, key: Key) -> PoolWindow:
        """Draw all trajectories of a window."""
        visits = self._order.read_window(key).cells
        numbers = visits // self.draws % len(self.trajectories)
        draws = key[0] * _EPOCH + visits
        taken = [self.taken(number, draw) for number, draw in zip(numbers.tolist(), draws.tolist(), strict=True)]
        points = [self.trajectories.points[n][times] for n, times in zip(numbers.tolist(), taken, strict=True)]
        at = (share_of_way(*self._key, _AT, key[0], key[2]) + key[1] * self._run) % 1
        cells = np.zeros((len(numbers), self.times, self.cells), np.int64)
        mask = np.zeros(cells.shape, bool)
        of = np.repeat(np.arange(len(points)), [len(populations) for populations in points])
        t = np.concatenate([np.arange(len(populations)) for populations in points])
        line = np.concatenate(points)
        order = np.argsort(line, kind="stable")
        edges = np.append(np.flatnonzero(np.diff(line[order], prepend=-1)), len(line)).tolist()
        for first, last in pairwise(edges):
            places = order[first:last]
            dealt = self._dealt(int(line[places[0]]), last - first, at, key)
            cells[of[places], t[places], : dealt.shape[1]] = dealt
            mask[of[places], t[places], : dealt.shape[1]] = True
        cells[~mask] = np.broadcast_to(cells[:, :1, :1], cells.shape)[~mask]
        rows = zip(numbers.tolist(), taken, cells, mask, draws.tolist(), strict=True)
        return PoolWindow(np.unique(cells), [self.on_grid(*row) for row in rows])

    def _dealt(self, number: int, uses: int, at: float, key: Key) -> I64:
        """Return the cells of each of the draws of a population in a window, int64 ``[uses, min(size, N)]``."""
        size = int(self.trajectories.edges[number + 1] - self.trajectories.edges[number])
        each = min(size, self.cells)
        run = self.trajectories.neighbours(number, uses * each, at, *self._key, _RUN, *key, number)
        at_once = len(run) // each
        turns = np.arange(-(-uses // at_once))[:, None]
        line = run[np.argsort(hash_keys(*self._key, _DEAL, *key, number, turns, np.arange(len(run))), axis=1)]
        return np.sort(line[:, : at_once * each].reshape(-1, each)[:uses], axis=1)
