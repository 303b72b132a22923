"""Each distance against a hand-computed, scipy or closed-form value, and the properties that its docstring claims."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance as scipy_energy

from bgen.evaluate.metrics.distribution import (
    energy_distance,
    median_bandwidth,
    mmd2,
    nearest_neighbour_accuracy,
    precision_recall,
    wasserstein2,
)

Array = NDArray[np.float64]
METRICS: dict[str, Callable[[Array, Array], float]] = {
    "w2": wasserstein2,
    "mmd2": lambda x, y: mmd2(x, y, 1.5),
    "energy": energy_distance,
    "nn": nearest_neighbour_accuracy,
    "precision": lambda x, y: precision_recall(x, y)[0],
    "recall": lambda x, y: precision_recall(x, y)[1],
}


def normal(seed: int, n: int = 200, d: int = 3, shift: float = 0.0, scale: float = 1.0) -> Array:
    return np.random.default_rng(seed).normal(shift, scale, size=(n, d))


def test_wasserstein_equals_the_best_assignment() -> None:
    x, y = normal(0, 60), normal(1, 60, shift=1.0)
    cost = cdist(x, y, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    assert wasserstein2(x, y) == pytest.approx(np.sqrt(cost[rows, columns].mean()), rel=1e-9)


def test_wasserstein_of_a_shift_is_its_length() -> None:
    x = normal(0, 50)
    assert wasserstein2(x, x + np.array([3.0, 4.0, 0.0])) == pytest.approx(5.0)
    assert wasserstein2(x, x[::-1]) == pytest.approx(0.0, abs=1e-6)


def test_wasserstein_in_one_dimension_pairs_sorted_values() -> None:
    x, y = normal(2, 4000, d=1), normal(3, 4000, d=1, shift=1.0, scale=2.0)
    exact = np.sqrt(((np.sort(x, axis=0) - np.sort(y, axis=0)) ** 2).mean())
    assert wasserstein2(x[:500], y[:500]) == pytest.approx(
        np.sqrt(((np.sort(x[:500], axis=0) - np.sort(y[:500], axis=0)) ** 2).mean()), rel=1e-6
    )
    assert exact == pytest.approx(np.sqrt(2.0), rel=0.05)  # N(0, 1) to N(1, 2): mean and sd both move by 1


def test_mmd_by_hand() -> None:
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [4.0]])
    k = lambda d: np.exp(-(d**2) / (2 * 1.5**2))  # noqa: E731
    expected = k(1.0) + k(2.0) - 2 * (k(2.0) + k(4.0) + k(1.0) + k(3.0)) / 4
    assert mmd2(x, y, 1.5) == pytest.approx(expected, rel=1e-12)


def test_mmd_of_gaussians_is_the_closed_form() -> None:
    # E k(x, y) for x ~ N(a, I), y ~ N(b, I): (s^2 / (s^2 + 2))^(d/2) exp(-|a - b|^2 / (2 (s^2 + 2)))
    s2, d, shift = 4.0, 3, 0.7
    scale = (s2 / (s2 + 2)) ** (d / 2)
    expected = 2 * scale * (1 - np.exp(-d * shift**2 / (2 * (s2 + 2))))
    assert mmd2(normal(0, 3000), normal(1, 3000, shift=shift), 2.0) == pytest.approx(expected, rel=0.1)


def test_energy_by_hand() -> None:
    x, y = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [0.0, 1.0]])
    between = (0.0 + 1.0 + 5.0 + np.hypot(3.0, 3.0)) / 4
    assert energy_distance(x, y) == pytest.approx(2 * between - 5.0 - 1.0)


def test_energy_in_one_dimension_is_that_of_scipy() -> None:
    # scipy returns the square root of the V-statistic: the means over pairs include i = i'.
    x, y = normal(0, 300, d=1), normal(1, 300, d=1, shift=0.8)
    within = cdist(x, x).mean() + cdist(y, y).mean()
    v_statistic = scipy_energy(x[:, 0], y[:, 0]) ** 2
    assert energy_distance(x, y) == pytest.approx(v_statistic + within - within * 300 / 299, rel=1e-9)


def test_energy_sees_more_than_means() -> None:
    assert energy_distance(normal(0, 500), normal(1, 500, scale=2.0)) > 0.2


@pytest.mark.parametrize("name", ["mmd2", "energy"])
def test_unbiased_for_equal_distributions(name: str) -> None:
    metric = METRICS[name]
    values = np.array([metric(normal(2 * i, 20), normal(2 * i + 1, 20)) for i in range(400)])
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error
    assert error < 0.01  # the biased V-statistic lies 0.06 (MMD) and 0.2 (energy) above
    assert (values < 0).any()


def test_median_bandwidth() -> None:
    assert median_bandwidth(np.array([[0.0], [1.0], [3.0]])) == 2.0
    with pytest.raises(ValueError, match="coincide"):
        median_bandwidth(np.zeros((5, 2)))


def test_nearest_neighbour_by_hand() -> None:
    x, y = np.array([[0.0], [10.0], [0.4]]), np.array([[1.0], [10.5], [30.0]])
    # 0 -> 0.4 same; 10 -> 10.5 other; 0.4 -> 0 same; 1 -> 0.4 other; 10.5 -> 10 other; 30 -> 10.5 same
    assert nearest_neighbour_accuracy(x, y) == pytest.approx(3 / 6)


def test_nearest_neighbour_range() -> None:
    x = normal(0, 400)
    assert nearest_neighbour_accuracy(x, x + 100.0) == 1.0
    assert nearest_neighbour_accuracy(x, x + 1e-9) == 0.0  # copies give themselves away on the other side of a half
    assert nearest_neighbour_accuracy(x, normal(1, 400)) == pytest.approx(0.5, abs=0.06)


def test_nearest_neighbours_at_equal_distance_share_the_vote() -> None:
    same = np.zeros((4, 2))
    assert nearest_neighbour_accuracy(same, same) == pytest.approx(3 / 7)


def test_precision_recall_by_hand() -> None:
    x = np.arange(4.0)[:, None]  # k = 1: every ball has radius 1, the manifold is [-1, 4]
    y = np.array([[0.5], [0.9], [4.5], [20.0]])  # radii 0.4, 0.4, 3.6, 15.5: [0.1, 1.3], [0.9, 8.1], [4.5, 35.5]
    assert precision_recall(x, y, k=1) == (0.5, 0.75)


def test_precision_and_recall_tell_narrow_from_broad() -> None:
    real = normal(0, 500)
    narrow, broad = normal(1, 500, scale=0.3), normal(2, 500, scale=3.0)
    assert precision_recall(real, narrow)[0] > 0.99
    assert precision_recall(real, narrow)[1] < 0.4
    assert precision_recall(real, broad)[0] < 0.5
    assert precision_recall(real, broad)[1] > 0.9


@pytest.mark.parametrize("name", METRICS)
def test_invariant_to_rotation_translation_and_order(name: str) -> None:
    x, y = normal(0, 80), normal(1, 80, shift=0.5)
    rotation, _ = np.linalg.qr(normal(2, 3))
    shuffled = np.random.default_rng(3).permutation(80)
    moved = METRICS[name]((x @ rotation + 7.0)[shuffled], y @ rotation + 7.0)
    assert moved == pytest.approx(METRICS[name](x, y), rel=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_unequal_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="same number of cells, got 80 and 79"):
        METRICS[name](normal(0, 80), normal(1, 79))


def test_bad_coordinates_are_refused() -> None:
    with pytest.raises(ValueError, match="same D"):
        wasserstein2(normal(0, 10, d=2), normal(0, 10, d=3))
    with pytest.raises(ValueError, match="finite"):
        energy_distance(normal(0, 10), np.full((10, 3), np.nan))
    with pytest.raises(ValueError, match="k = 5 needs"):
        precision_recall(normal(0, 5), normal(1, 5))
    with pytest.raises(ValueError, match="bandwidth"):
        mmd2(normal(0, 10), normal(1, 10), 0.0)
