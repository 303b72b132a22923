"""Figures of a predicted effect, on effects that can be reckoned by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.evaluate.metrics.effects import correlation, direction, discrimination, slope

NOTHING = np.array([], np.int64)


def test_discrimination_leaves_out_what_was_perturbed_itself() -> None:
    real = [np.array([0.0, 1.0, 0.0]), np.array([100.0, 0.0, 1.0])]
    predicted = np.array([100.0, 1.0, 0.0])  # wrong in the first gene, which is the target
    assert discrimination(predicted, real, 0, np.array([0])) == 1.0
    assert discrimination(predicted, real, 0, NOTHING) == 0.0
    assert discrimination(np.zeros(3), [np.ones(3), -np.ones(3)], 0, NOTHING) == 0.5
    assert np.isnan(discrimination(predicted, real[:1], 0, NOTHING))


def test_the_others_are_what_their_names_say() -> None:
    effect, real = np.array([1.0, -2.0, 0.5]), np.array([2.0, -4.0, 1.0])
    assert correlation(effect, real) == pytest.approx(1.0)
    assert correlation(effect, np.zeros(3)) == 0.0
    assert direction(effect, real * [1, 1, -1]) == pytest.approx(2 / 3)
    assert slope(effect, real, float(real @ real)) == pytest.approx(0.5)
