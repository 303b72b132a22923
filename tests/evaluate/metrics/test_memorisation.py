"""Memorisation is seen where cells are copied and not where they are new; calibration where widths are right."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.evaluate.metrics.calibration import calibration
from bgen.evaluate.metrics.memorisation import memorisation


def cells(rng: np.random.Generator, n: int) -> sp.csr_matrix:
    profiles = np.random.default_rng(9).dirichlet(np.full(60, 0.5), 4)
    shares = profiles[rng.integers(4, size=n)]
    return sp.csr_matrix(rng.poisson(rng.lognormal(6, 0.3, n)[:, None] * shares).astype(np.float32))


def test_new_cells_are_no_copies_and_copies_are_found() -> None:
    rng = np.random.default_rng(0)
    train, test, new = cells(rng, 800), cells(rng, 600), cells(rng, 600)
    honest = memorisation(train, test, new)
    assert not honest.found
    assert honest.copies == 0
    assert honest.distance == pytest.approx(honest.distance_real, rel=0.1)
    assert "No memorisation seen" in honest.sentence()
    copied = memorisation(train, test, sp.csr_matrix(sp.vstack([new[:500], train[:100]])))
    assert copied.found
    assert copied.copies > 0.1
    noisy = train[:600].copy()
    noisy.data = noisy.data + (rng.random(noisy.nnz) < 0.1)
    nearly = memorisation(train, test, noisy)
    assert nearly.found
    assert nearly.copies < 0.05
    assert nearly.as_json()["found"]


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
