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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.keys import hash_keys, hash_text, permutation

_ORDER, _POINTS, _CELLS, _AT = 3, 4, 5, 7  # what a key is for

SLAB = 2048
"""Cells of a shuffled piece within which a share of the way is exact."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The populations of a split, and the trajectories that they form.

    Attributes
    ----------
    cells
        int64 ``[n]``: numbers of the cells, population by population, ascending within each.
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

    cells: I64
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
        cls, cells: I64, system: Sequence[NDArray[Any]], time: NDArray[np.floating[Any]], control: NDArray[np.bool_]
    ) -> Trajectories:
        """Group by system and time.

        Parameters
        ----------
        cells
            int64 ``[n]``, ascending.
        system
            Columns ``[n]`` that together name a system; none: all cells are one.
        time
            ``[n]``; a cell without one (NaN) belongs to no trajectory.
        control
            bool ``[n]``; a population is control if all its cells are.
        """
        known = np.isfinite(time)
        cells, control, time = cells[known], control[known], time[known]
        code = _codes([column[known] for column in system], len(cells))
        order, edges, first = _group([time.astype(np.float64), code])
        is_control = np.logical_and.reduceat(control[order], edges[:-1]) if len(order) else np.zeros(0, bool)
        bounds = np.flatnonzero(np.diff(code[first], prepend=-1, append=-1)) if len(first) else np.zeros(1, np.int64)
        points = [np.arange(a, b) for a, b in pairwise(bounds)]
        when = time[first].astype(np.float32)
        return cls(cells[order], edges, points, [when[p] for p in points], [is_control[p] for p in points])

    @classmethod
    def along_perturbation(
        cls,
        cells: I64,
        system: Sequence[NDArray[Any]],
        perturbation: NDArray[Any],
        control: int,
        amount: NDArray[np.floating[Any]] | None = None,
        time: NDArray[np.floating[Any]] | None = None,
    ) -> Trajectories:
        """Join the control population of each system and its populations under each perturbation and amount.

        Parameters
        ----------
        cells
            int64 ``[n]``, ascending.
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
        """
        known = (perturbation >= 0) & (np.isfinite(time) if time is not None else True)
        cells, perturbation = cells[known], perturbation[known]
        is_control = perturbation == control
        given = np.zeros(len(cells)) if amount is None else np.nan_to_num(amount[known].astype(np.float64), nan=-1.0)
        treatment = 1 + _codes([perturbation, given], len(cells))
        treatment[is_control] = 0  # whatever their amounts, and the first of their system
        when = np.ones(len(cells)) if time is None else time[known].astype(np.float64)
        before = 0.0 if len(when) == 0 or when.min() > 0 else float(when.min()) - 1
        when[is_control] = before
        code = _codes([column[known] for column in system], len(cells))
        order, edges, first = _group([when, treatment, code])
        points, times, controls, kinds = [], [], [], []
        bounds = np.flatnonzero(np.diff(code[first], prepend=-1, append=-1)) if len(first) else np.zeros(1, np.int64)
        for a, b in pairwise(bounds):
            if not is_control[first[a]]:
                continue
            done = treatment[first[a + 1 : b]]
            for kind, members in zip(*_runs(done), strict=True):
                points.append(np.concatenate([[a], a + 1 + members]))
                times.append(when[first[points[-1]]].astype(np.float32))
                controls.append(np.arange(len(points[-1])) == 0)
                kinds.append(kind)
        return cls(cells[order], edges, points, times, controls, np.array(kinds, np.int64))

    def population(self, number: int) -> I64:
        """Return the cells of a population, ascending."""
        return self.cells[self.edges[number] : self.edges[number + 1]]

    def shuffled_within(self, group: NDArray[Any]) -> Trajectories:
        """Return these, told that cells ``[n]`` of the line with the same value of ``group`` lie in random order."""
        return replace(self, pieces=np.union1d(self.edges, np.flatnonzero(group[1:] != group[:-1]) + 1))

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
            return self.cells[low:high]
        if self.pieces is None:
            return self.cells[low + choose(size, n, *key)]
        bounds = self.pieces[np.searchsorted(self.pieces, low) : np.searchsorted(self.pieces, high) + 1]
        phase = int(hash_keys(*key)) % size  # rounds the parts of the pieces, up as often as is right
        taken = np.diff(((bounds - low) * n + phase) // size)
        starts = np.array([self._start(a, b, at) for a, b in pairwise(bounds.tolist())])
        piece = np.repeat(np.arange(len(taken)), taken)
        place = starts[piece] + np.arange(n) - np.repeat(np.cumsum(taken) - taken, taken)
        return np.sort(self.cells[bounds[piece] + place % np.diff(bounds)[piece]])

    def _start(self, low: int, high: int, at: float) -> int:
        """Return which cell of a piece ``low:high`` of the line is a share ``at`` of the way."""
        slabs = max(1, (high - low) // SLAB)
        if slabs == 1:
            return int(at * (high - low))
        line = self.cells[low:high]
        slab = int(at * slabs)
        edges = int(line[0]) + np.array([slab, slab + 1]) * (int(line[-1]) + 1 - int(line[0])) // slabs
        first, last = np.searchsorted(line, edges).tolist()
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
        cells = np.full((self.times, self.cells), self.trajectories.cells[self.trajectories.edges[points[0]]])
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


def _codes(columns: Sequence[NDArray[Any]], n: int) -> I64:
    """Number the distinct combinations of columns ``[n]``."""
    code = np.zeros(n, np.int64)
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        code = np.unique(code * len(values) + inverse, return_inverse=True)[1]
    return code


def _group(columns: Sequence[NDArray[Any]]) -> tuple[I64, I64, I64]:
    """Group rows by columns (the last is the primary key): rows in order, edges of the groups, their first rows."""
    order = np.lexsort(columns)  # stable: rows ascend within a group
    new = np.zeros(len(order), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= np.diff(column[order]) != 0
    starts = np.flatnonzero(new)
    return order, np.append(starts, len(order)), order[starts]
