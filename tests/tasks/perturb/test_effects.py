"""Effects of sets, doses and unseen targets, from a few that are known."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.tasks.perturb.effects import Effects


def test_between_doses_the_nearer_one_weighs_more() -> None:
    values = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    drug = Effects([("d",), ("d",)], np.array([1.0, 100.0]), values)
    rows, nothing = np.zeros((2, 1), np.float32), np.array([-1])
    for dose, expected in ((1.0, [1, 0]), (10**0.5, [0.75, 0.25]), (10.0, [0.5, 0.5]), (100.0, [0, 1]), (1e4, [0, 1])):
        np.testing.assert_allclose(drug.of(["d"], dose, rows, nothing, {"d": -1}), expected, atol=1e-6)
    np.testing.assert_allclose(drug.of(["d"], 0.5, rows, nothing, {"d": -1}), [0.5, 0], atol=1e-6)
    assert drug.of(["d"], None, rows, nothing, {"d": -1}) == pytest.approx([0.5, 0.5])


def test_a_trained_dose_of_none_is_where_the_effect_begins() -> None:
    """Its logarithm is not taken."""
    values = np.array([[0.2, 0.0], [1.0, 4.0]], np.float32)
    drug = Effects([("d",), ("d",)], np.array([0.0, 8.0]), values)
    rows, nothing = np.zeros((2, 1), np.float32), np.array([-1])
    for dose, expected in ((0.0, [0.2, 0]), (2.0, [0.4, 1]), (4.0, [0.6, 2]), (8.0, [1, 4]), (9.0, [1, 4])):
        np.testing.assert_allclose(drug.of(["d"], dose, rows, nothing, {"d": -1}), expected, atol=1e-6)


def test_the_average_effect_does_not_hold_the_knock_downs_of_targets_themselves() -> None:
    """Each of four targets turns itself off and moves gene 4 alike."""
    values = np.zeros((4, 6), np.float32)
    values[:, 4] = 1.0
    values[np.arange(4), np.arange(4)] = -3.0
    names = [f"g{number}" for number in range(4)]
    effects = Effects([(name,) for name in names], np.full(4, np.nan), values)
    places = {name: number for number, name in enumerate(names)}
    found = effects.of(["new"], None, np.zeros((6, 2), np.float32), np.array([5]), places)
    assert found[4] == pytest.approx(1.0)
    assert found[5] == pytest.approx(-3.0)  # its own, typical knock-down
    # In the place of each one's own knock-down stands the average over all targets, -3 / 4, of which a quarter is left.
    np.testing.assert_allclose(found[:4], -3 / 16)
