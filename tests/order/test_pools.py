"""Trajectories drawn from pools: exact for any ranks, as good as independent draws, and cheap to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.order.pools import DECODED, PooledTrajectories
from bgen.order.trajectories import SLAB, Trajectories, share_of_way

N, T, CHUNK = 16, 3, 64


def courses(systems: int, size: int, *, ordered: bool, seed: int = 0) -> Trajectories:
    """Populations of about ``size`` cells, at three times: each by itself in the store, or spread over all of it."""
    rng = np.random.default_rng(seed)
    population = np.repeat(np.arange(systems * T), rng.integers(size // 2, 2 * size, systems * T))
    if not ordered:
        population = rng.permutation(population)
    n = len(population)
    found = Trajectories.over_time(np.arange(n), [population // T], (population % T).astype(float), np.zeros(n, bool))
    return found.shuffled_within(population[found.cells] if ordered else np.zeros(n))


def pooled(trajectories: Trajectories, batch: int = 12, lanes: int = 4, pool: int = 4000) -> PooledTrajectories:
    first_cell = np.append(np.arange(0, len(trajectories.cells), CHUNK), len(trajectories.cells))
    return PooledTrajectories(trajectories, batch, T, N, 5, "x", lanes=lanes, pool=pool, first_cell=first_cell)


def windows(order: PooledTrajectories, epochs: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the rounds of the first epochs: the windows that the lanes walk through side by side."""
    keys = [(0, lane, 0) for lane in range(order.lanes)]
    while keys[0][0] < epochs:
        yield keys
        keys = [order.next_window(key) for key in keys]


def decoded(cells: I64) -> int:
    return CHUNK * len(np.unique(cells // CHUNK))


@pytest.mark.parametrize(("systems", "batch", "lanes"), [(1, 5, 3), (7, 12, 4), (60, 12, 4), (60, 4, 8)])
def test_slices_are_slices_and_an_epoch_has_every_trajectory_alike(systems: int, batch: int, lanes: int) -> None:
    trajectories = courses(systems, 40, ordered=True)
    order, again = (pooled(trajectories, batch, lanes) for _ in range(2))
    drawn = [grid for step in range(3) for grid in order.read(step)]
    later = [
        grid
        for step in (2, 0, 1)
        for part in (range(2), range(2, batch))
        for grid in again.read(step, part[0], part[-1] + 1)
    ]
    ranked = sorted(range(3 * batch), key=lambda i: ((2, 0, 1)[i // batch], i % batch))
    assert all(np.array_equal(a.cells, later[i].cells) for a, i in zip(drawn, ranked, strict=True))
    assert len({grid.draw for grid in drawn}) == len(drawn)
    epoch = len(order._order.members)
    assert epoch % systems == 0
    steps = -(-epoch // batch)
    seen = Counter([grid.number for step in range(steps) for grid in order.read(step)][:epoch])
    assert seen == dict.fromkeys(range(systems), epoch // systems)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_draw_has_distinct_cells_of_its_populations(ordered: bool) -> None:
    trajectories = courses(20, 20, ordered=ordered)  # some populations have fewer cells than a draw takes
    order = pooled(trajectories)
    sizes = np.diff(trajectories.edges)
    assert sizes.min() < N < sizes.max()
    for grid in (grid for step in range(40) for grid in order.read(step)):
        for t, point in enumerate(trajectories.points[grid.number]):
            held = grid.cells[t][grid.mask[t]]
            assert len(np.unique(held)) == len(held) == min(N, sizes[point])
            assert np.isin(held, trajectories.population(int(point))).all()
        assert np.isin(grid.cells, trajectories.cells).all()


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("size", [30, 1000])
def test_little_is_decoded_that_is_not_used(ordered: bool, size: int) -> None:
    systems = 30 if size == 1000 else 150
    order = pooled(courses(systems, size, ordered=ordered), lanes=4, pool=8000)
    for _, keys in zip(range(2), windows(order, 3), strict=False):
        cells = [order.window(key).cells for key in keys]
        used = sum(int(grid.mask.sum()) for key in keys for grid in order.window(key).grids)
        assert decoded(np.unique(np.concatenate(cells))) <= DECODED * used  # what one rank reads
        if not ordered:  # a rank of several lanes shares what it reads
            assert decoded(np.unique(np.concatenate(cells))) < 0.7 * sum(map(decoded, cells))
        else:  # what ranks of one lane each read; k was chosen by one window
            assert sum(map(decoded, cells)) <= 1.2 * DECODED * used


@pytest.mark.parametrize("ordered", [True, False])
def test_draws_agree_with_independent_ones(ordered: bool) -> None:
    """Means and covariance, over many draws, of what a draw says of its population."""
    trajectories = courses(6, 400, ordered=ordered)
    order = pooled(trajectories, batch=4, lanes=2, pool=1500)
    rng = np.random.default_rng(1)
    # of each cell: two types, and two numbers that go with them
    kind = rng.integers(0, 3, len(trajectories.cells))
    told = np.stack([kind == 0, kind == 1, kind + rng.normal(0, 1, len(kind)), rng.gamma(1.0, size=len(kind))], axis=1)
    draws: dict[int, list[NDArray[np.float64]]] = {}
    for step in range(400):
        for grid in order.read(step):
            for t, point in enumerate(trajectories.points[grid.number]):
                draws.setdefault(int(point), []).append(told[grid.cells[t]].mean(0))
    assert len(draws) == 18
    misses, spreads, lines = [], [], []
    for point, rows in draws.items():
        found, members = np.array(rows), told[trajectories.population(point)]
        # what is expected of means of N cells that are drawn without replacement
        covariance = np.cov(members.T) / N * (1 - N / len(members))
        misses.append((found.mean(0) - members.mean(0)) / np.sqrt(np.diag(covariance) / len(found)))
        whiten = np.linalg.inv(np.linalg.cholesky(covariance))
        spreads.append(whiten @ np.cov(found.T) @ whiten.T)
        lines.append(len(members) / N)  # of so many draws that share no cell does a population consist
    # draws of one run share no cell, so the mean of all is nearer than that of independent ones, never farther
    assert np.abs(misses).max() < 4
    assert np.square(misses).mean() < 1.3
    # the ratio of the covariances, over all populations, is one
    ratio, error = np.average(spreads, axis=0, weights=lines), np.sqrt(2 / sum(lines))
    assert abs(ratio - np.eye(4)).max() < 4 * error


@pytest.mark.parametrize(
    ("ordered", "size"), [(True, 100), pytest.param(False, 100, marks=pytest.mark.slow), (True, 30)]
)
def test_cells_of_a_population_are_used_equally_often(ordered: bool, size: int) -> None:
    trajectories = courses(3, size, ordered=ordered)
    order = pooled(trajectories, batch=6, lanes=2, pool=1200)
    used = np.zeros(len(trajectories.cells))
    turned = np.zeros(3 * T)
    for _, keys in zip(range(150), windows(order, 1 << 20), strict=False):
        for key in keys:
            window = order.window(key)
            for grid in window.grids:
                np.add.at(used, grid.cells[grid.mask], 1)
            turned += [np.isin(trajectories.population(number), window.cells).any() for number in range(3 * T)]
    for number in range(3 * T):
        mine = used[trajectories.population(number)]
        # a run is used as a whole: what is counted is runs, of which each cell is in the same share
        share = min(1.0, mine.sum() / turned[number] / len(mine))
        error = mine.mean() * np.sqrt((1 - share) / share / turned[number]) + np.sqrt(mine.mean())
        assert abs(mine - mine.mean()).max() < 4.5 * error


def test_a_small_population_is_dealt_anew_once_it_is_used_up() -> None:
    order = pooled(courses(200, 24, ordered=False), lanes=2, pool=2000)
    assert order.draws >= 4
    window = order.window((0, 0, 0))
    drawn: dict[int, list[tuple[int, ...]]] = {}
    for grid in window.grids:
        drawn.setdefault(grid.number, []).append(tuple(grid.cells[0][grid.mask[0]].tolist()))
    sizes = np.diff(order.trajectories.edges)
    some = [rows for number, rows in drawn.items() if N < sizes[order.trajectories.points[number][0]] < 2 * N]
    assert len(some) > 5
    assert all(len(set(rows)) > len(rows) / 2 for rows in some if len(rows) > 3)


def test_neighbours_are_equally_likely_whatever_the_pieces() -> None:
    # one population in pieces of 50, 30 and 20 cells, as where a store is shuffled within something finer
    cells = np.concatenate([np.arange(50), 200 + np.arange(30), 500 + np.arange(20)])
    one = Trajectories.over_time(cells, [], np.zeros(100), np.zeros(100, bool))
    pieces = one.shuffled_within(np.repeat([0, 1, 2], [50, 30, 20]))
    times = np.zeros(501 + 20)
    for key in range(4000):
        drawn = pieces.neighbours(0, 7, share_of_way(1, key), 2, key)
        assert len(np.unique(drawn)) == 7
        each = np.histogram(drawn, [0, 200, 500, 600])[0]
        assert (abs(each - 7 * np.array([0.5, 0.3, 0.2])) < 1).all()  # as many as is its part
        times[drawn] += 1
    assert abs(times[cells] - 280).max() < 5 * np.sqrt(280)
    assert len(one.neighbours(0, 7, 0.5, 3)) == 7  # nothing is known to be shuffled: any cells
    assert np.ptp(one.neighbours(0, 7, 0.5, 3)) > 7


def test_large_populations_that_are_spread_alike_share_a_place() -> None:
    rng = np.random.default_rng(0)
    n = 400_000
    time = rng.integers(0, 4, n).astype(float)
    four = Trajectories.over_time(np.arange(n), [], time, np.zeros(n, bool)).shuffled_within(np.zeros(n))
    assert len(four.cells) > 40 * SLAB
    times = np.zeros(n)
    for key in range(400):
        at = share_of_way(key)
        drawn = [four.neighbours(number, 100, at, key, number) for number in range(4)]
        middle = [np.median(cells) for cells in drawn if np.ptp(cells) < n / 2]  # not from the end to the beginning
        # within a slab the line of a population is off by sqrt(SLAB) / 2 of its cells, or so; one of four is its
        assert np.ptp(middle or [0]) < 4 * 4 * np.sqrt(2 * SLAB)
        times[np.concatenate(drawn)] += 1
    # no part of the store is used more: 20 parts, 400 places
    parts = times.reshape(20, -1).sum(1)
    assert abs(parts - parts.mean()).max() < 5 * parts.mean() / np.sqrt(400 / 20)
