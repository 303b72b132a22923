"""Figures of a predicted effect, on effects that can be reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bgen.evaluate.metrics.distribution import Points
from bgen.evaluate.metrics.effects import (
    METRICS,
    PredictedEffect,
    RatioMetric,
    correlation,
    direction,
    discrimination,
    explained,
    gene_weights,
    recovery,
    shape,
    specific,
)

NOTHING = np.array([], np.int64)
BY_KEY = {metric.key: metric for metric in METRICS}


def test_discrimination_leaves_out_what_was_perturbed_itself() -> None:
    real = np.array([[0.0, 1.0, 0.0], [100.0, 0.0, 1.0]])
    predicted = np.array([100.0, 1.0, 0.0])  # wrong in the first gene, which is the target
    assert discrimination(predicted, real, 0, [np.array([0]), NOTHING]) == 1.0
    assert discrimination(predicted, real, 0, [NOTHING, NOTHING]) == 0.0
    assert discrimination(np.zeros(3), np.array([[1.0, 1, 1], [-1, -1, -1]]), 0, [NOTHING, NOTHING]) == 0.5
    assert np.isnan(discrimination(predicted, real[:1], 0, [NOTHING]))


def test_another_effect_is_no_further_for_the_knock_down_of_its_own_target() -> None:
    """Each of three turns itself off, and nothing else: no prediction can tell them apart."""
    real = -5.0 * np.eye(3)
    targets = [np.array([at]) for at in range(3)]
    assert [discrimination(np.zeros(3), real, own, targets) for own in range(3)] == [0.5] * 3
    assert discrimination(np.zeros(3), real, 0, [NOTHING] * 3) == 0.5
    assert discrimination(np.array([0.0, -5.0, 0.0]), real, 0, [NOTHING] * 3) == 0.25  # as the second


def test_correlation_and_direction() -> None:
    effect, real = np.array([1.0, -2.0, 0.5]), np.array([2.0, -4.0, 1.0])
    assert correlation(effect, real) == pytest.approx(1.0)
    assert correlation(effect, np.zeros(3)) == 0.0
    assert direction(effect, real * [1, 1, -1]) == pytest.approx(2 / 3)
    assert direction(np.zeros(3), real) == 0.5  # no more wrong than a guess
    assert direction(np.array([1.0, 0.0, 0.0]), real) == pytest.approx(2 / 3)
    assert direction(effect, np.array([2.0, 0.0, 0.0])) == 1.0  # no right side where nothing happens
    assert np.isnan(direction(effect, np.zeros(3)))


def test_recovery_is_the_area_under_the_curve() -> None:
    clear = np.array([True, True, False, False])
    assert recovery(np.array([-3.0, 2.0, 1.0, 0.0]), clear) == 1.0
    assert recovery(np.array([0.0, 1.0, -2.0, 3.0]), clear) == 0.0
    assert recovery(np.array([3.0, 1.0, -2.0, 0.0]), clear) == 0.75
    assert recovery(np.zeros(4), clear) == 0.5
    assert np.isnan(recovery(np.ones(4), np.ones(4, bool)))


def test_explained_and_calibration_are_freed_of_noise() -> None:
    """Of 40 % of an effect that can be known, 40 % is explained, whatever noise is in all of them."""
    rng = np.random.default_rng(0)
    known, unknown = np.sqrt(0.4) * rng.normal(size=200_000), np.sqrt(0.6) * rng.normal(size=200_000)

    def noisy(effect: np.ndarray) -> np.ndarray:
        return effect + rng.normal(size=effect.shape)

    for factor in (1.0, 2.5):
        p, other, real, real_other = (
            noisy(factor * known), noisy(factor * known), noisy(known + unknown), noisy(known + unknown),
        )  # fmt: skip
        size = real @ real_other
        assert explained(p, (p, other), real) / size == pytest.approx(2 * factor * 0.4 - factor**2 * 0.4, abs=0.03)
        assert (p @ real) / (p @ other) == pytest.approx(1 / factor, abs=0.03)


def evidence(**changed: object) -> PredictedEffect:
    cells = np.random.default_rng(1).normal(size=(2, 40, 3))
    effect = np.array([1.0, 2.0, -1.0, 50.0])
    real = np.array([[1.0, 2.0, -2.0, 9.0], [0.0, 1.0, 1.0, 0.0]])
    given = PredictedEffect(
        real=cells[0],
        other=cells[1],
        effect=effect,
        halves=(effect, effect),
        real_effects=real,
        targets=[np.array([3]), NOTHING],
        own=0,
        other_effect=np.array([1.0, 1.0, -1.0, -70.0]),
        means=(np.array([0.5, 1.0, 0.0, 0.0]), np.array([0.5, 1.5, -0.5, 0.0])),
        scale=2.0,
        clearness=np.array([2.0, 1.0, 3.0, 99.0]),
        real_clearness=np.array([1.0, 2.0, 3.0, 99.0]),
        noise=np.full(4, 0.5),
    )
    return replace(given, **changed)  # type: ignore[arg-type]


def test_every_figure_leaves_the_target_out() -> None:
    here = evidence()
    assert here.top.tolist() == [2, 0, 1]
    np.testing.assert_allclose(here.weights, [3 * 3 / 11, 0, 3 * 8 / 11, 0])
    effects = [np.array([1.0, 2.0, -1.0, at_target]) for at_target in (-8.0, 3.0, 51.0)]
    absurd = evidence(effect=effects[0], halves=(effects[1], effects[2]))
    for metric in METRICS:
        if metric.key != "shape":
            assert metric.compute(absurd) == pytest.approx(metric.compute(here), nan_ok=True), metric.key
        if isinstance(metric, RatioMetric):
            assert metric.under(absurd) == pytest.approx(metric.under(here)), metric.key


def test_what_the_records_compute() -> None:
    here = evidence()
    p, r = here.effect[:3], here.real_effect[:3]
    w = np.array([9, 0, 24]) / 11
    expected = {
        "explained": 2 * p @ r - p @ p,
        "explained_de": 2 * w @ (p * r) - w @ p**2,
        "calibration": p @ r,
        "pearson": np.corrcoef(p, r)[0, 1],
        "specific": (p - [0.5, 1, 0]) @ (r - [0.5, 1.5, -0.5]),
        "direction": 1.0,
        "recovery": np.nan,
        "discrimination": 1.0,
    }
    for key, value in expected.items():
        assert BY_KEY[key].compute(here) == pytest.approx(value, nan_ok=True), key
    sizes = ((p - [0.5, 1, 0]) ** 2).sum(), ((r - [0.5, 1.5, -0.5]) ** 2).sum()
    unders = {
        "explained": r @ [1, 1, -1],
        "explained_de": w @ (r**2 - 0.5),
        "calibration": p @ p,
        "specific": (2 * sizes[0] + sizes[1] / 2) / 2,
    }
    for key, value in unders.items():
        metric = BY_KEY[key]
        assert isinstance(metric, RatioMetric)
        assert metric.under(here) == pytest.approx(value), key
    assert np.isnan(specific(evidence(real_effects=here.real_effects[:1])))


def test_no_gene_is_clear_and_none_has_a_weight() -> None:
    assert gene_weights(np.array([0.5, 0.9]), np.arange(2)).tolist() == [0, 0]


def test_shape_does_not_see_the_mean_but_what_is_about_it() -> None:
    rng = np.random.default_rng(2)
    cells = rng.normal(size=(300, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]])
    other = rng.normal(size=(300, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]])
    assert shape(Points(cells, other + 7.0)) == pytest.approx(shape(Points(cells, other)))
    alike = abs(shape(Points(cells, other)))
    assert shape(Points(cells, rng.permuted(other, axis=0))) > 5 * alike
    assert shape(Points(cells, 0.5 * other)) > 5 * alike
