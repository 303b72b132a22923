"""Which populations and cells make up the trajectories of a step: a pure function of (store, split, seed, step).

A population is the cells of one system (the columns that name it have the same values) at one time. A trajectory is the
populations of one system in the order of time; or, along a perturbation, the control population of a system and then
those under one perturbation and amount, in the order of time. Every trajectory
comes once an epoch, in a keyed random order. If it has more time points or cells than asked for, a keyed random choice
of time points, and keyed neighbours of a population, are taken.

Neighbours, because a store is read by chunks: a build shuffles the cells of a population, so neighbours in its line of
cells are as random a choice as any other, and lie in few chunks (:func:`Trajectories.neighbours`). Training shares
what it reads among many draws besides (:mod:`bgen.order.pools`).

Axes: S trajectories, P populations, T time points, N cells per time point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.cells import Cells
from bgen.order.groups import Column, Groups, Rows, parts
from bgen.order.keys import hash_keys, hash_text, permutation

_ORDER, _POINTS, _CELLS, _AT = 3, 4, 5, 7  # what a key is for

Share = Callable[[int, np.dtype[Any], Callable[[NDArray[Any]], None]], NDArray[Any]]
"""Returns an array of so many entries of a type, which a function has written, or had written before."""

SLAB = 2048
"""Cells of a shuffled piece within which a share of the way is exact."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The populations of a split, and the trajectories that they form.

    Attributes
    ----------
    cells
        ``[n]``: numbers of the cells, population by population, ascending within each; uint32 where that holds them.
    edges
        int64 ``[P + 1]``: population p is ``cells[edges[p]:edges[p + 1]]``.
    points
        Numbers of the populations of each trajectory, in the order of time.
    times
        Their times.
    controls
        bool: whether they are controls.
    treatment
        int64 ``[S]``: number of what is done in each, whatever its system; empty over time.
    pieces
        int64 ``[Q + 1]``, ``edges`` among them: the cells ``pieces[q]:pieces[q + 1]`` of the line ``cells`` were
        shuffled by who wrote them. None: their order means something, or nobody knows.
    """

    cells: NDArray[np.integer[Any]]
    edges: I64
    points: Sequence[I64]
    times: Sequence[NDArray[np.float32]]
    controls: Sequence[NDArray[np.bool_]]
    treatment: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    pieces: I64 | None = None

    def __len__(self) -> int:
        return len(self.points)

    @classmethod
    def over_time(
        cls,
        cells: Cells,
        system: Sequence[NDArray[Any]],
        time: NDArray[np.floating[Any]],
        control: NDArray[np.bool_],
        share: Share | None = None,
    ) -> Trajectories:
        """Group by system and time.

        Parameters
        ----------
        cells
            ``[n]``, ascending.
        system
            Columns ``[n]`` that together name a system; none: all cells are one.
        time
            ``[n]``; a cell without one (NaN) belongs to no trajectory.
        control
            bool ``[n]``; a population is control if all its cells are.
        share
            Makes the array of the cells; None: in this process' own memory.
        """
        n = len(time)
        by = Groups(
            [*(_column(values) for values in system), lambda rows: time[rows].astype(np.float64)],
            n,
            lambda rows: np.isfinite(time[rows]),
        )
        is_control = by.count(lambda rows: control[rows]) == np.diff(by.edges)
        of = Groups([_column(values) for values in system], n).codes(by.first) if len(by) else np.zeros(0, np.int64)
        bounds = np.flatnonzero(np.diff(of, prepend=-1, append=-1)) if len(by) else np.zeros(1, np.int64)
        points = [np.arange(a, b) for a, b in pairwise(bounds)]
        when = time[by.first].astype(np.float32)
        line = _line(by, cells, share)
        return cls(line, by.edges, points, [when[p] for p in points], [is_control[p] for p in points])

    @classmethod
    def along_perturbation(
        cls,
        cells: Cells,
        system: Sequence[NDArray[Any]],
        perturbation: NDArray[Any],
        control: int,
        amount: NDArray[np.floating[Any]] | None = None,
        time: NDArray[np.floating[Any]] | None = None,
        share: Share | None = None,
    ) -> Trajectories:
        """Join the control population of each system and its populations under each perturbation and amount.

        Parameters
        ----------
        cells
            ``[n]``, ascending.
        system
            As in :meth:`over_time`. A system without control cells belongs to no trajectory.
        perturbation
            Codes ``[n]``, of which ``control`` is one; a cell without one (-1) belongs to no trajectory.
        amount
            ``[n]``; None: all perturbations have one amount.
        time
            ``[n]``, since the perturbation began: a trajectory has a population for each. The control population, of
            all times, stands at 0, or one unit before the first if that is not above 0. None: controls are at 0, and
            all cells under the perturbation at 1.
        share
            As in :meth:`over_time`.
        """
        n = len(perturbation)

        def known(rows: Rows) -> NDArray[np.bool_]:
            return (perturbation[rows] >= 0) & (np.isfinite(time[rows]) if time is not None else True)

        def given(rows: Rows) -> NDArray[np.float64]:
            if amount is None:
                return np.zeros(len(perturbation[rows]))
            return np.nan_to_num(amount[rows].astype(np.float64), nan=-1.0)

        done = Groups([_column(perturbation), given], n, known)
        earliest = 1.0
        if time is not None:
            lows = [time[rows][known(rows)].min(initial=np.inf) for rows in parts(n)]
            earliest = float(min(lows, default=np.inf))
        before = 0.0 if earliest > 0 else earliest - 1

        def treatment(rows: Rows) -> I64:  # 0: control, whatever its amounts, and the first of its system
            return np.where(perturbation[rows] == control, 0, 1 + done.codes(rows))

        def when(rows: Rows) -> NDArray[np.float64]:
            since = 1.0 if time is None else time[rows].astype(np.float64)
            return np.where(perturbation[rows] == control, before, since)

        by = Groups([*(_column(values) for values in system), treatment, when], n, known)
        points, times, controls, kinds = [], [], [], []
        bounds = np.zeros(1, np.int64)
        if len(by):
            of = Groups([_column(values) for values in system], n, known).codes(by.first)
            bounds = np.flatnonzero(np.diff(of, prepend=-1, append=-1))
            treated, since = treatment(by.first), when(by.first).astype(np.float32)
        for a, b in pairwise(bounds):
            if treated[a] != 0:
                continue
            for kind, members in zip(*_runs(treated[a + 1 : b]), strict=True):
                points.append(np.concatenate([[a], a + 1 + members]))
                times.append(since[points[-1]])
                controls.append(np.arange(len(points[-1])) == 0)
                kinds.append(kind)
        return cls(_line(by, cells, share), by.edges, points, times, controls, np.array(kinds, np.int64))

    def population(self, number: int) -> I64:
        """Return the cells of a population, ascending."""
        return self.cells[self.edges[number] : self.edges[number + 1]].astype(np.int64)

    def shuffled_within(self, group: NDArray[Any], *, by_cell: bool = False) -> Trajectories:
        """Return these, told that cells ``[n]`` of the line with the same value of ``group`` lie in random order.

        ``by_cell``: it has the values by the number of the cell.
        """
        pieces = [self.edges]
        for part in parts(max(0, len(self.cells) - 1)):
            line = slice(part.start, part.stop + 1)
            some = group[self.cells[line]] if by_cell else group[line]
            pieces.append(part.start + np.flatnonzero(some[1:] != some[:-1]) + 1)
        return replace(self, pieces=np.unique(np.concatenate(pieces)))

    def neighbours(self, number: int, n: int, at: float, *key: int) -> I64:
        """Return min(n, size) distinct cells of a population, ascending, each of them equally likely.

        They are neighbours in the line of the population's cells, from a share ``at`` of the way on, where the line is
        one shuffled piece; else neighbours in each piece, as many as is its part of the population; and any cells
        where nothing was shuffled. Populations that are spread over the same chunks have their cells at one share of
        the way in the same chunks, about: so one ``at`` for many of them makes them share what is read.

        Parameters
        ----------
        at
            From 0 up to 1; uniform where cells are to be equally likely. Of pieces of more than :data:`SLAB` cells it
            tells the place in the store, in steps of about so many cells, so that cells are alike to 2 %.
        key
            Of what ``at`` leaves open: a uniform choice for each population.
        """
        low, high = int(self.edges[number]), int(self.edges[number + 1])
        size = high - low
        if n >= size:
            return self.population(number)
        if self.pieces is None:
            return self.cells[low + choose(size, n, *key)].astype(np.int64)
        bounds = self.pieces[np.searchsorted(self.pieces, low) : np.searchsorted(self.pieces, high) + 1]
        phase = int(hash_keys(*key)) % size  # rounds the parts of the pieces, up as often as is right
        taken = np.diff(((bounds - low) * n + phase) // size)
        starts = np.array([self._start(a, b, at) for a, b in pairwise(bounds.tolist())])
        piece = np.repeat(np.arange(len(taken)), taken)
        place = starts[piece] + np.arange(n) - np.repeat(np.cumsum(taken) - taken, taken)
        return np.sort(self.cells[bounds[piece] + place % np.diff(bounds)[piece]].astype(np.int64))

    def _start(self, low: int, high: int, at: float) -> int:
        """Return which cell of a piece ``low:high`` of the line is a share ``at`` of the way."""
        slabs = max(1, (high - low) // SLAB)
        if slabs == 1:
            return int(at * (high - low))
        line = self.cells[low:high]
        slab = int(at * slabs)
        edges = int(line[0]) + np.array([slab, slab + 1]) * (int(line[-1]) + 1 - int(line[0])) // slabs
        first, last = np.searchsorted(line, edges.astype(line.dtype)).tolist()  # of one type, or the line is copied
        return int(first + (at * slabs - slab) * (last - first))


@dataclass(frozen=True, eq=False)
class GridOfCells:
    """One trajectory on a grid; where there is no cell, ``mask`` is False and some cell of the trajectory stands in.

    Attributes
    ----------
    cells
        int64 ``[T, N]``: numbers of cells in the store.
    mask
        bool ``[T, N]``.
    time
        float32 ``[T]``, ascending; the last one is repeated where there are no more.
    control
        bool ``[T]``.
    number
        Of the trajectory.
    taken
        Which of its time points stand here, ascending; at most T.
    draw
        What it was drawn for.
    population
        int64 ``[T]``: numbers of its populations; -1 where there are no more.
    """

    cells: I64
    mask: NDArray[np.bool_]
    time: NDArray[np.float32]
    control: NDArray[np.bool_]
    number: int
    taken: I64
    draw: int
    population: I64


class TrajectoryOrder:
    """The trajectories of every step.

    Parameters
    ----------
    trajectories
        The trajectories of the split.
    batch
        Trajectories per global batch.
    times, cells
        T and N.
    seed
        Seed of the order.
    name
        What distinguishes this order from another of the same seed: store fingerprint and split.
    first_population
        What the first population is numbered by in its grids.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        batch: int,
        times: int,
        cells: int,
        seed: int,
        name: str,
        first_population: int = 0,
    ) -> None:
        if len(trajectories) == 0:
            raise ValueError(f"There are no trajectories in {name}.")
        self.trajectories, self.batch, self.times, self.cells = trajectories, batch, times, cells
        self.seed, self.name, self._key = seed, name, (seed, hash_text(name))
        self.first_population = first_population
        self._epoch = lru_cache(maxsize=2)(self._permute)

    def read(self, step: int, start: int = 0, stop: int | None = None) -> list[GridOfCells]:
        """Return the trajectories in slots ``start:stop`` of a step's global batch."""
        first = step * self.batch
        return [self.at(j) for j in range(first + start, first + (self.batch if stop is None else stop))]

    def at(self, position: int) -> GridOfCells:
        """Return the trajectory at a position of the endless line of all epochs."""
        epoch, place = divmod(position, len(self.trajectories))
        return self.grid(int(self._epoch(epoch)[place]), position)

    def grid(self, number: int, draw: int) -> GridOfCells:
        """Return trajectory ``number`` with the time points and cells that belong to ``draw``."""
        points, taken = self.trajectories.points[number], self.taken(number, draw)
        at = share_of_way(*self._key, _AT, draw)
        stand_in = int(self.trajectories.cells[self.trajectories.edges[points[0]]])
        cells = np.full((self.times, self.cells), stand_in, np.int64)
        mask = np.zeros((self.times, self.cells), bool)
        for t, point in enumerate(taken):
            key = (*self._key, _CELLS, draw, t)
            chosen = self.trajectories.neighbours(int(points[point]), self.cells, at, *key)
            cells[t, : len(chosen)], mask[t, : len(chosen)] = chosen, True
        return self.on_grid(number, taken, cells, mask, draw)

    def taken(self, number: int, draw: int) -> I64:
        """Return which time points of a trajectory belong to ``draw``, ascending."""
        n = len(self.trajectories.points[number])
        if n <= self.times:
            return np.arange(n)
        taken = np.sort(permutation(n, *self._key, _POINTS, draw)[: self.times])
        if len(self.trajectories.treatment):  # what is done is always done to control cells
            taken[0] = 0
        return taken

    def on_grid(self, number: int, taken: I64, cells: I64, mask: NDArray[np.bool_], draw: int) -> GridOfCells:
        """Return cells ``[T, N]`` of the time points ``taken`` with what is known of these."""
        last = np.minimum(np.arange(self.times), len(taken) - 1)
        time, control = self.trajectories.times[number][taken], self.trajectories.controls[number][taken]
        population = np.full(self.times, -1)
        population[: len(taken)] = self.first_population + self.trajectories.points[number][taken]
        return GridOfCells(cells, mask, time[last], control[last] & mask.any(1), number, taken, draw, population)

    def _permute(self, epoch: int) -> I64:
        return permutation(len(self.trajectories), *self._key, _ORDER, epoch)


def share_of_way(*key: int) -> float:
    """Return a number from 0 up to 1 that belongs to ``key``."""
    return int(hash_keys(*key) >> np.uint64(11)) * 2.0**-53


def choose(n: int, k: int, *key: int) -> I64:
    """Return min(n, k) distinct numbers below n, ascending, that belong to ``key``."""
    if n <= k:
        return np.arange(n)
    if n > 16 * k:  # not worth permuting all of them
        drawn = (hash_keys(*key, np.arange(2 * k + 16)) % np.uint64(n)).astype(np.int64)
        distinct = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        if len(distinct) >= k:
            return np.sort(distinct[:k])
    return np.sort(permutation(n, *key)[:k])


def _runs(values: I64) -> tuple[list[int], list[I64]]:
    """Return the distinct values of a sorted array, and the places of each."""
    bounds = np.flatnonzero(np.diff(values, prepend=-1, append=-1)) if len(values) else np.zeros(1, np.int64)
    return [int(values[a]) for a, _ in pairwise(bounds)], [np.arange(a, b) for a, b in pairwise(bounds)]


def _column(values: NDArray[Any]) -> Column:
    return lambda rows: values[rows]


def _line(by: Groups, cells: Cells, share: Share | None) -> NDArray[np.integer[Any]]:
    """Return the numbers of the cells, group by group."""

    def numbers(rows: Rows) -> I64:
        if not isinstance(cells, range):
            return cells[rows]
        return cells.start + (np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows)

    def fill(line: NDArray[Any]) -> None:
        by.fill(line, numbers)

    n = int(by.edges[-1])
    small = len(cells) == 0 or int(cells[-1]) < np.iinfo(np.uint32).max
    kind = np.dtype(np.uint32 if small else np.int64)
    if share is not None:
        return share(n, kind, fill)
    line = np.empty(n, kind)
    fill(line)
    return line
