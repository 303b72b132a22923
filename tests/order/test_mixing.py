"""Populations mixed between systems: towards means of others with the same treatment, and by nothing else."""

from __future__ import annotations

import numpy as np

from bgen.order.mixing import Mixing
from bgen.order.trajectories import Trajectories, TrajectoryOrder

SYSTEMS, TREATMENTS, EACH = 4, 3, 5


def trajectories() -> Trajectories:
    n = SYSTEMS * TREATMENTS * EACH
    system, label = np.arange(n) // (TREATMENTS * EACH), np.arange(n) // EACH % TREATMENTS
    return Trajectories.along_perturbation(np.arange(n), [system], label, control=0)


def mixing(share: float, concentration: float = 0.5) -> Mixing:
    found = trajectories()
    means = np.zeros((len(found.edges) - 1, 2), np.float32)
    for population in range(len(means)):
        cell = found.population(population)[0]
        means[population] = cell // (TREATMENTS * EACH), cell // EACH % TREATMENTS  # its system, its treatment
    return Mixing(found, means, share, concentration, seed=0)


def test_only_systems_of_the_same_treatment_are_mixed() -> None:
    made = mixing(1.0)
    order = TrajectoryOrder(made.trajectories, 1, 2, 4, 0, "x")
    moved = np.array([made.moved(grid) for step in range(200) for grid in order.read(step)])
    assert np.abs(moved[:, :, 1]).max() < 1e-6  # the treatment stays, and with it the second coordinate
    np.testing.assert_allclose(moved[:, 0], moved[:, 1], atol=1e-6)  # both means move by the same, as they differ alike
    systems = np.array([grid.cells[0, 0] // (TREATMENTS * EACH) for step in range(200) for grid in order.read(step)])
    ends = systems + moved[:, 0, 0]
    assert ends.min() >= -1e-6
    assert ends.max() <= SYSTEMS - 1 + 1e-6
    assert abs(ends.mean() - (SYSTEMS - 1) / 2) < 0.2


def test_it_is_a_pure_function_of_the_draw_and_the_share_is_kept() -> None:
    made = mixing(0.3)
    order = TrajectoryOrder(made.trajectories, 1, 2, 4, 0, "x")
    grids = [grid for step in range(400) for grid in order.read(step)]
    moved = np.array([made.moved(grid) for grid in grids])
    assert np.array_equal(moved[7], made.moved(grids[7]))
    assert 0.2 < moved.any((1, 2)).mean() < 0.4
    assert not any(mixing(0.0).moved(grid).any() for grid in grids[:50])


def test_a_treatment_of_one_system_stays() -> None:
    cells = np.arange(20)
    found = Trajectories.along_perturbation(cells, [cells // 10], np.array([0] * 5 + [1] * 5 + [0] * 5 + [2] * 5), 0)
    made = Mixing(found, np.ones((4, 2), np.float32), 1.0, 0.5, seed=0)
    for grid in TrajectoryOrder(found, 2, 2, 4, 0, "x").read(0):
        assert made.alike(grid.number).tolist() == [grid.number]
        assert not made.moved(grid).any()
