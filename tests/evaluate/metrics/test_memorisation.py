"""Memorisation is seen where cells are copied and not where they are new; calibration where widths are right."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.evaluate.metrics.calibration import calibration
from bgen.evaluate.metrics.memorisation import _excess, memorisation

PROFILES = np.random.default_rng(9).dirichlet(np.full(600, 0.3), 4)


def cells(rng: np.random.Generator, n: int) -> sp.csr_matrix:
    shares = PROFILES[rng.integers(4, size=n)]
    return sp.csr_matrix(rng.poisson(rng.lognormal(6, 0.3, n)[:, None] * shares).astype(np.float32))


def thinned(counts: sp.csr_matrix, share: float, rng: np.random.Generator) -> sp.csr_matrix:
    """Every molecule stays with this probability."""
    kept = counts.copy()
    kept.data = rng.binomial(kept.data.astype(np.int64), share).astype(np.float32)
    kept.eliminate_zeros()
    return kept


def test_new_cells_are_no_copies() -> None:
    rng = np.random.default_rng(0)
    honest = memorisation(cells(rng, 800), cells(rng, 600), cells(rng, 300))
    assert not honest.found
    assert honest.copies == 0
    assert honest.distance == pytest.approx(honest.distance_real, rel=0.1)
    assert "No memorisation seen" in honest.sentence()
    assert honest.as_json()["found"] is False


@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("copies", "p_copies"),
        ("a tenth of the molecules replaced", "p_alike"),
        ("90 % of one and 10 % of another", "p_alike"),
        ("halves of two", "p_alike"),
    ],
)
def test_two_per_cent_of_repeated_cells_are_found(what: str, by: str) -> None:
    rng = np.random.default_rng(0)
    train, test, new = cells(rng, 800), cells(rng, 1200), cells(rng, 588)
    one, other = (train[rng.choice(800, 12, replace=False)] for _ in range(2))
    repeated = {
        "copies": one,
        "a tenth of the molecules replaced": thinned(one, 0.9, rng) + thinned(cells(rng, 12), 0.1, rng),
        "90 % of one and 10 % of another": thinned(one, 0.9, rng) + thinned(other, 0.1, rng),
        "halves of two": thinned(one, 0.5, rng) + thinned(other, 0.5, rng),
    }[what]
    found = memorisation(train, test, sp.csr_matrix(sp.vstack([new, repeated])))
    assert found.found
    assert getattr(found, by) < 0.05 / 3
    assert "repeat training cells more" in found.sentence()


def test_few_copies_among_few_cells_are_found() -> None:
    """4.7 % of 300 cells, and none of as many real ones."""
    rng = np.random.default_rng(1)
    train, test, new = cells(rng, 800), cells(rng, 600), cells(rng, 286)
    found = memorisation(train, test, sp.csr_matrix(sp.vstack([new, train[:14]])))
    assert found.p_copies < 1e-3
    assert found.found


def test_cells_that_are_too_typical_are_not_called_copies() -> None:
    """Nearer to all training cells than real ones, and to none alone."""
    rng = np.random.default_rng(2)
    typical = sp.csr_matrix(np.rint(400 * PROFILES[rng.integers(4, size=300)]).astype(np.float32))
    found = memorisation(cells(rng, 800), cells(rng, 600), typical)
    assert found.distance < 0.95 * found.distance_real
    assert not found.found


def test_one_test_in_twenty_is_wrong_at_most() -> None:
    """Cells of the same distribution, 300 times: the count of false alarms is within three standard errors."""
    rng = np.random.default_rng(3)
    alarms = sum(_excess(rng.random(150), rng.random(150), rng) < 0.05 for _ in range(300))
    assert alarms <= 300 * 0.05 + 3 * np.sqrt(300 * 0.05 * 0.95)


def test_calibration_tells_right_wide_and_narrow() -> None:
    rng = np.random.default_rng(1)
    mean, theta = rng.uniform(0.2, 20, (400, 30)), rng.uniform(0.5, 5, 30)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(theta, 1 / theta, mean.shape) * mean))
    right = calibration(counts, mean, theta)
    assert right.ks < 0.015
    assert right.coverage_50 == pytest.approx(0.5, abs=0.02)
    assert right.coverage_90 == pytest.approx(0.9, abs=0.02)
    assert calibration(counts, mean, theta * 10).coverage_90 < 0.85
    assert calibration(counts, mean, theta / 10).coverage_50 > 0.55
