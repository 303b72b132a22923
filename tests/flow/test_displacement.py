"""Displacement interpolation against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import ot
import pytest

from bgen.flow.displacement import displace, draw, pair, transport_plan


def cells(seed: int, n: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3)) + shift


def test_the_plan_is_optimal_and_moves_all_mass() -> None:
    x, y = cells(0, 40), cells(1, 25, 1.0)
    i, j, weights = transport_plan(x, y)
    np.testing.assert_allclose(np.bincount(i, weights), 1 / 40, atol=1e-12)
    np.testing.assert_allclose(np.bincount(j, weights), 1 / 25, atol=1e-12)
    cost = (weights * ((x[i] - y[j]) ** 2).sum(1)).sum()
    assert cost == pytest.approx(ot.emd2([], [], ot.dist(x, y)))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_shifted_population_is_met_on_the_way(share: float) -> None:
    x = cells(0, 30)
    points, weights = displace(x, x[::-1] + np.array([4.0, 0.0, -2.0]), share)
    np.testing.assert_allclose(weights, 1 / 30)
    np.testing.assert_allclose(points, x + share * np.array([4.0, 0.0, -2.0]), atol=1e-12)


def test_drawing_keeps_to_the_weights() -> None:
    weights = np.array([0.5, 0.2, 0.2, 0.1])
    for seed in range(20):
        counts = np.bincount(draw(weights, 20, np.random.default_rng(seed)), minlength=4)
        assert (np.abs(counts - 20 * weights) <= 1).all()


def test_pairs_are_one_to_one_and_cheapest() -> None:
    x, y = cells(0, 7), cells(1, 7)
    j = pair(x, y)
    assert sorted(j) == list(range(7))
    assert ((x - y[j]) ** 2).sum() / 7 == pytest.approx(ot.emd2([], [], ot.dist(x, y)))
