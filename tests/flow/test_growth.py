"""Growth between two populations, and what it makes of the way between them."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.flow.displacement import displaced_pairs
from bgen.flow.growth import growth

N, DOUBLED, STAYED = 240, slice(0, 120), slice(120, 240)


def two_fates(doubled: int, stayed: int, at: float) -> np.ndarray:
    """Cells of two fates, 8 apart, that both drift by ``at``; those of the first come first."""
    cells = np.random.default_rng(doubled).normal(size=(doubled + stayed, 3))
    cells[:doubled, 0] += 8
    cells[:, 1] += at
    return cells


EARLY, LATE = two_fates(120, 120, 0.0), two_fates(200, 100, 1.0)


def test_cells_of_a_type_that_doubles_are_twice_as_often_the_partner_of_later_ones() -> None:
    r = growth(EARLY, LATE, 0.1)
    assert r.sum() == pytest.approx(1)
    assert r[DOUBLED].sum() == pytest.approx(2 / 3, abs=0.03)
    assert growth(EARLY, LATE, 1e4)[DOUBLED].sum() == pytest.approx(1 / 2, abs=0.01)  # too dear
    np.testing.assert_allclose(growth(EARLY, LATE, 1e4), 1 / N, rtol=0.02)


def test_a_far_cell_changes_nothing_but_itself() -> None:
    far = np.concatenate([EARLY, [[1e3, 1e3, 1e3]]])
    r = growth(far, LATE, 0.1)
    assert np.isfinite(r).all()
    assert r[-1] < 1e-6


def test_on_the_way_a_type_has_grown_by_its_rate_so_far() -> None:
    r = growth(EARLY, LATE, 0.1)
    for share in (0.0, 0.5, 1.0):
        i, _, weights = displaced_pairs(EARLY, LATE, share, r)
        of_cells = np.bincount(i, weights, minlength=N)
        expected = r**share * (1 / N) ** (1 - share)
        np.testing.assert_allclose(of_cells, expected / expected.sum(), atol=1e-9)
    i, j, _ = displaced_pairs(EARLY, LATE, 0.5, r)
    crossing = (i < 120) != (j < 200)
    alike = displaced_pairs(EARLY, LATE, 0.5)
    assert crossing.mean() < 0.05 < ((alike[0] < 120) != (alike[1] < 200)).mean()
