"""Baselines against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.effects.contexts import left_out_errors
from bgen.effects.estimates import log_effect
from bgen.tasks.perturb.baselines import (
    TrainedEffects,
    additive,
    average_dose,
    gene_set_ridge,
    latent_shift,
    mean_effect,
    measure_effects,
    nearest_dose,
    with_own,
)

NOTHING = np.array([], np.int64)


def trained(
    values: np.ndarray, keys: list | None = None, cells: list[int] | None = None, targets: list | None = None
) -> TrainedEffects:
    n = len(values)
    return TrainedEffects(
        keys or [((f"p{number}",), None) for number in range(n)],
        np.asarray(values, float),
        np.array(cells or [10] * n),
        targets or [NOTHING] * n,
    )


def test_effects_are_those_of_every_group_within_strata() -> None:
    """Also where a stratum has no control cells."""
    rng = np.random.default_rng(0)
    logs = sp.csr_matrix(rng.poisson(1.0, (200, 6)).astype(np.float32))
    stratum = rng.integers(4, size=200)
    rows = rng.permutation(200)
    control = np.sort(rows[:90])
    control = control[stratum[control] != 2]
    groups = [np.sort(rows[90:120]), np.sort(rows[120:200]), rows[120:121]]
    expected = [log_effect(logs, group, control, stratum) for group in groups]
    np.testing.assert_allclose(measure_effects(logs, groups, control, stratum), expected, atol=1e-6)


def test_the_mean_effect_leaves_own_knock_downs_to_the_targets() -> None:
    values = np.array([[-3.0, 1.0, 2.0], [0.0, -5.0, 4.0], [1.0, 1.0, 6.0]])
    effects = trained(values, cells=[10, 30, 60], targets=[np.array([0]), np.array([1]), NOTHING])
    mean, own = mean_effect(effects, by_cells=False)
    assert mean == pytest.approx([0.5, 1.0, 4.0])
    assert own == -4.0
    mean, own = mean_effect(effects, by_cells=True)
    assert mean == pytest.approx([60 / 90, (10 + 60) / 70, (20 + 120 + 360) / 100])
    assert own == pytest.approx((10 * -3 + 30 * -5) / 40)
    assert with_own(mean, np.array([2]), own).tolist() == [mean[0], mean[1], own]
    alone, own = mean_effect(trained(values[:1], targets=[np.array([0])]), by_cells=False)
    assert alone[0] == -3.0  # nothing else is known of that gene
    assert mean_effect(trained(values), by_cells=False)[1] == 0.0


def test_members_add_up() -> None:
    effects = trained(np.eye(3), [(("a",), 1.0), (("b",), 1.0), (("b",), 2.0)])
    found = additive((("a", "b"), 1.0), effects)
    assert found is not None
    assert found.tolist() == [1, 1, 0]
    assert additive((("a", "b"), 2.0), effects) is None
    assert additive((("a",), 1.0), effects) is None


def test_the_nearest_dose_is_so_on_a_logarithmic_scale() -> None:
    keys = [(("d",), 0.0), (("d",), 1.0), (("d",), 10.0), (("e",), 4.0)]
    assert nearest_dose((("d",), 4.0), keys) == (("d",), 10.0)
    assert nearest_dose((("d",), 2.0), keys) == (("d",), 1.0)
    assert nearest_dose((("d",), 0.0), keys) is None
    assert nearest_dose((("f",), 4.0), keys) is None


def test_the_average_dose_is_that_of_the_others_by_cells() -> None:
    keys = [(("d",), 0.0), (("d",), 1.0), (("d",), 10.0), (("e",), 4.0), (("d",), 4.0)]
    effects = trained(np.diag([1.0, 2, 4, 8, 16]), keys, cells=[5, 10, 30, 40, 50])
    found = average_dose((("d",), 4.0), effects)
    assert found is not None
    assert found == pytest.approx([0, 0.25 * 2, 0.75 * 4, 0, 0])
    assert average_dose((("e",), 4.0), effects) is None
    assert average_dose((("d",), None), effects) is None


def test_the_latent_shift_weighs_strata_alike() -> None:
    rng = np.random.default_rng(1)
    stratum = np.repeat([0, 1, 0, 1], [20, 20, 40, 5])
    values = rng.normal(size=(85, 4))
    logs = sp.csr_matrix(values.astype(np.float32))
    control, perturbed = np.arange(40), np.arange(40, 85)
    means = [values[40:80].mean(0) - values[:20].mean(0), values[80:].mean(0) - values[20:40].mean(0)]
    axes = np.linalg.qr(rng.normal(size=(4, 2)))[0].T.astype(np.float32)
    found = latent_shift(logs, perturbed, control, stratum, axes)
    np.testing.assert_allclose(found, axes.T @ (axes @ np.mean(means, axis=0)), atol=1e-6)
    np.testing.assert_allclose(
        latent_shift(logs, perturbed, control, stratum, np.eye(4, dtype=np.float32)), np.mean(means, axis=0), atol=1e-6
    )


def test_errors_of_what_is_left_out_are_those_of_leaving_it_out() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 5))
    hat = x @ np.linalg.inv(x.T @ x + 2 * np.eye(3)) @ x.T
    expected = []
    for row in range(7):
        rest = np.delete(np.arange(7), row)
        weights = np.linalg.solve(x[rest].T @ x[rest] + 2 * np.eye(3), x[rest].T @ y[rest])
        expected.append(((y[row] - x[row] @ weights) ** 2).sum())
    np.testing.assert_allclose(left_out_errors(hat, y @ y.T), expected)


def test_gene_sets_tell_the_groups_of_targets_apart() -> None:
    """Two pathways with opposite effects."""
    rng = np.random.default_rng(3)
    side = np.repeat([1.0, -1.0], 6)
    pattern = rng.normal(size=20)
    effects = trained(side[:, None] * pattern + 0.1 * rng.normal(size=(12, 20)))
    rows = np.stack([side > 0, side < 0], 1).astype(float)
    found = gene_set_ridge(effects, rows, np.array([1.0, 0.0]))
    assert found is not None
    assert np.corrcoef(found, pattern)[0, 1] > 0.95
    assert found @ pattern / (pattern @ pattern) == pytest.approx(1, abs=0.15)
    other = gene_set_ridge(effects, rows, np.array([0.0, 1.0]))
    assert other is not None
    assert np.corrcoef(other, pattern)[0, 1] < -0.95
    assert gene_set_ridge(effects, rows, np.zeros(2)) is None
    blind = gene_set_ridge(effects, rng.permuted(rows, axis=0), np.array([1.0, 0.0]))
    assert blind is not None
    assert np.abs(blind).max() < 0.6 * np.abs(found).max()
