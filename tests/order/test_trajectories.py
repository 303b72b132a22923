"""The trajectories of a step: properties of the order, over random splits."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bgen.order.trajectories import Trajectories, TrajectoryOrder, choose

SEEDS = st.integers(0, 10_000)


class Split:
    """Random cells of a few systems at a few times."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 300))
        self.cells = np.sort(rng.choice(1000, n, replace=False))
        self.donor = rng.integers(-1, 3, n)
        self.drug = rng.integers(0, 2, n)
        self.time = rng.choice([0.0, 6.0, 12.5, 48.0, np.nan], n, p=[0.3, 0.3, 0.2, 0.1, 0.1])
        self.control = self.drug == 0
        self.trajectories = Trajectories.over_time(self.cells, [self.donor, self.drug], self.time, self.control)

    def of(self, donor: int, drug: int, time: float) -> set[int]:
        return set(self.cells[(self.donor == donor) & (self.drug == drug) & (self.time == time)].tolist())


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_populations_are_the_cells_of_one_system_at_one_time(seed: int) -> None:
    split = Split(seed)
    place = {int(cell): i for i, cell in enumerate(split.cells)}
    found = []
    for points, times, controls in zip(
        split.trajectories.points, split.trajectories.times, split.trajectories.controls, strict=True
    ):
        assert all(a < b for a, b in pairwise(times))
        systems = set()
        for point, time, control in zip(points, times, controls, strict=True):
            members = split.trajectories.population(int(point))
            first = place[int(members[0])]
            system = (int(split.donor[first]), int(split.drug[first]))
            systems.add(system)
            assert set(members.tolist()) == split.of(*system, time)
            assert (np.diff(members) > 0).all()
            assert control == (system[1] == 0)
            found += members.tolist()
        assert len(systems) == 1
    assert sorted(found) == split.cells[~np.isnan(split.time)].tolist()


@given(SEEDS, st.integers(2, 4), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_every_trajectory_once_and_slices_are_slices(seed: int, T: int, N: int, batch: int) -> None:
    split = Split(seed)
    if len(split.trajectories) == 0:
        return
    order = TrajectoryOrder(split.trajectories, batch, T, N, seed, "store/train")
    S = len(split.trajectories)
    again = TrajectoryOrder(split.trajectories, 7 * batch, T, N, seed, "store/train")
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for position in range(epoch * S, (epoch + 1) * S):
            grid, same = order.at(position), again.at(position)
            assert np.array_equal(grid.cells, same.cells)
            assert grid.cells.shape == grid.mask.shape == (T, N)
            owner = [
                number
                for number, points in enumerate(split.trajectories.points)
                if grid.cells[0, 0] in np.concatenate([split.trajectories.population(int(p)) for p in points])
            ]
            seen[owner[0]] += 1
        assert seen == dict.fromkeys(range(S), 1)
    step = order.read(3)
    parts = [*order.read(3, 0, 1), *order.read(3, 1, batch)]
    assert all(np.array_equal(a.cells, b.cells) for a, b in zip(step, parts, strict=True))


@given(SEEDS, st.integers(2, 5), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_a_grid_holds_distinct_cells_of_its_populations(seed: int, T: int, N: int) -> None:
    split = Split(seed)
    if len(split.trajectories) == 0:
        return
    order = TrajectoryOrder(split.trajectories, 2, T, N, seed, "store/train")
    for number, points in enumerate(split.trajectories.points):
        grid = order.grid(number, draw=seed)
        sizes = {
            float(t): len(split.trajectories.population(int(p)))
            for p, t in zip(points, split.trajectories.times[number], strict=True)
        }
        assert grid.mask.any(1).sum() == min(T, len(points))
        assert (np.diff(grid.time) >= 0).all()
        for t in range(T):
            held = grid.cells[t][grid.mask[t]]
            assert len(set(held.tolist())) == len(held)
            if len(held):
                assert len(held) == min(N, sizes[float(grid.time[t])])
                point = points[list(split.trajectories.times[number]).index(grid.time[t])]
                assert set(held.tolist()) <= set(split.trajectories.population(int(point)).tolist())
            else:
                assert not grid.control[t]
        assert np.isin(grid.cells, split.trajectories.cells).all()


def test_other_seeds_stores_and_epochs_give_other_orders() -> None:
    n = 600
    trajectories = Trajectories.over_time(
        np.arange(n), [np.arange(n) % 30], np.repeat([0.0, 1.0], n // 2), np.zeros(n, bool)
    )
    orders = [
        TrajectoryOrder(trajectories, 30, 2, 5, seed, name).read(step)
        for seed, name, step in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    ]
    first = [tuple(int(grid.cells[0, 0]) % 30 for grid in order) for order in orders]
    assert len(set(first)) == 4
    assert all(sorted(row) == list(range(30)) for row in first)


def test_a_perturbation_follows_its_own_control() -> None:
    cells = np.arange(12)
    system = np.array([0] * 6 + [1] * 3 + [2] * 3)
    label = np.array([1, 1, 0, 2, 2, -1, 2, 2, 2, 1, 0, 0])  # system 1 has no control cells
    found = Trajectories.along_perturbation(cells, [system], label, control=1)
    pairs = [tuple(found.population(int(p)).tolist() for p in points) for points in found.points]
    assert sorted(pairs) == [([0, 1], [2]), ([0, 1], [3, 4]), ([9], [10, 11])]
    assert all(times.tolist() == [0.0, 1.0] for times in found.times)
    grid = TrajectoryOrder(found, 1, 3, 2, 0, "x").grid(0, 0)
    assert grid.control.tolist() == [True, False, False]


def test_amounts_are_apart_and_times_of_one_treatment_are_a_course() -> None:
    label = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    amount = np.array([0.0, 0.0, 1.0, 1.0, 3.0, np.nan, 1.0, 1.0])
    time = np.array([6.0, 24.0, 6.0, 24.0, 6.0, 6.0, 24.0, 24.0])
    cells = np.arange(8)
    apart = Trajectories.along_perturbation(cells, [], label, 0, amount)
    assert [apart.population(int(points[1])).tolist() for points in apart.points] == [[5], [2, 3], [4], [6, 7]]
    assert len(set(apart.treatment.tolist())) == 4
    course = Trajectories.along_perturbation(cells, [], label, 0, None, time)
    assert [times.tolist() for times in course.times] == [[0.0, 6.0, 24.0], [0.0, 24.0]]
    assert all(course.population(int(points[0])).tolist() == [0, 1] for points in course.points)
    early = Trajectories.along_perturbation(cells, [], label, 0, None, time - 6)
    assert early.times[0].tolist() == [-1.0, 0.0, 18.0]


def test_a_choice_of_time_points_keeps_the_control() -> None:
    label = np.array([0] * 3 + [1] * 30)
    time = np.concatenate([np.zeros(3), np.repeat(np.arange(1.0, 11), 3)])
    found = Trajectories.along_perturbation(np.arange(33), [], label, 0, None, time)
    order = TrajectoryOrder(found, 1, 3, 2, 0, "x")
    grids = [grid for step in range(40) for grid in order.read(step)]
    assert all(grid.control.tolist() == [True, False, False] for grid in grids)
    assert len({tuple(grid.time.tolist()) for grid in grids}) > 10


@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 3), (10, 3), (1000, 3), (49, 3), (64, 4)])
def test_choices_are_distinct_ascending_and_even(n: int, k: int) -> None:
    counts = np.zeros(max(n, 1))
    for key in range(2000):
        chosen = choose(n, k, 7, key)
        assert len(chosen) == min(n, k)
        assert (np.diff(chosen) > 0).all()
        counts[chosen] += 1
    if n:
        expected = 2000 * min(n, k) / n
        assert abs(counts - expected).max() < 6 * np.sqrt(expected) + 1
    assert np.array_equal(choose(n, k, 7, 1), choose(n, k, 7, 1))
