"""Effects of sets, doses, contexts and unseen targets, from a few that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bgen.effects.context_pool import ContextPool, Controls
from bgen.effects.effects import MOST_LARGER, RIDGES, Effects, Known
from bgen.hub.about import EffectPooling
from bgen.models.generators.average_effects import AverageEffects


def known(sets: list[tuple[str, ...]], doses: list[float], values: np.ndarray) -> Effects:
    """Effects in one context that all control cells are of."""
    genes = values.shape[1]
    return Effects(
        sets=sets,
        doses=np.array(doses, np.float64),
        general=values.astype(np.float32),
        cells=np.full(len(sets), 50, np.float32),
        own=np.zeros((0, genes), np.float32),
        own_of=np.zeros((0, 2), np.int64),
        pool=ContextPool(np.full((1, genes), 9, np.float32), np.zeros(1), np.zeros((1, genes), np.float32)),
    )


def test_between_doses_the_nearer_one_weighs_more() -> None:
    drug = known([("d",), ("d",)], [1.0, 100.0], np.array([[1.0, 0.0], [0.0, 1.0]]))
    for dose, expected in ((1.0, [1, 0]), (10**0.5, [0.75, 0.25]), (10.0, [0.5, 0.5]), (100.0, [0, 1]), (1e4, [0, 1])):
        np.testing.assert_allclose(drug.of(["d"], dose), expected, atol=1e-6)
    np.testing.assert_allclose(drug.of(["d"], 0.5), [0.5, 0], atol=1e-6)
    assert drug.of(["d"], None) == pytest.approx([0.5, 0.5])


def test_a_trained_dose_of_none_is_where_the_effect_begins() -> None:
    """Its logarithm is not taken."""
    drug = known([("d",), ("d",)], [0.0, 8.0], np.array([[0.2, 0.0], [1.0, 4.0]]))
    for dose, expected in ((0.0, [0.2, 0]), (2.0, [0.4, 1]), (4.0, [0.6, 2]), (8.0, [1, 4]), (9.0, [1, 4])):
        np.testing.assert_allclose(drug.of(["d"], dose), expected, atol=1e-6)


def test_an_unseen_pair_is_the_sum_of_its_members_times_the_factor() -> None:
    effects = known([("a",), ("b",), ("a", "c")], [np.nan] * 3, np.array([[1.0, 0], [0, 2.0], [5.0, 5]]))
    effects = replace(effects, pooling=EffectPooling(pairs=0.8))
    np.testing.assert_allclose(effects.of(["b", "a"], None), [0.8, 1.6], rtol=1e-6)
    np.testing.assert_allclose(effects.of(["c", "a"], None), [5, 5])  # this one was trained on
    np.testing.assert_allclose(effects.of(["a"], None), [1, 0])


def in_contexts() -> Effects:
    """One perturbation in three contexts; the third is far from the others."""
    logs = np.array([[1.0, 1, 1, 1], [1, 2, 1, 1], [1, 1, 1, 9]], np.float32)
    own = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], np.float32)
    return replace(
        known([("a",)], [np.nan], np.ones((1, 4))),
        own=own,
        own_of=np.array([[0, 0], [1, 0], [2, 0]]),
        pool=ContextPool(logs, np.zeros(3), np.zeros_like(logs)),
    )


def cells(*logs: float) -> Controls:
    return Controls(np.expm1(np.array(logs)), np.zeros(len(logs)))


def test_a_context_of_training_has_its_own_effect() -> None:
    effects = in_contexts()
    np.testing.assert_allclose(effects.of(["a"], None, cells(1, 1, 1, 9)), [1, 1, 2, 1], atol=1e-6)
    np.testing.assert_allclose(effects.of(["a"], None), [1, 1, 1, 1])


def test_another_context_has_that_of_contexts_alike() -> None:
    effects, strange = in_contexts(), cells(1, 5, 1, 5)
    np.testing.assert_allclose(effects.of(["a"], None, strange), [4 / 3, 4 / 3, 4 / 3, 1], atol=1e-3)
    narrow = replace(effects, pool=replace(effects.pool, width=1.0))
    away = np.array([32.0, 25.0, 32.0])
    weight = np.exp(-(away - 25))
    np.testing.assert_allclose(narrow.of(["a"], None, strange), [1 + w for w in (*weight / weight.sum(), 0)], atol=1e-3)


def test_the_bilinear_form_turns_effects_by_the_control_state_of_unseen_contexts() -> None:
    effects, strange = in_contexts(), cells(1, 5, 1, 5)
    centre = effects.pool.logs.mean(0)
    axes = np.array([[0, 0.5, 0, 0]], np.float32)
    form = replace(
        effects,
        pooling=EffectPooling(bilinear=1.0, features=1, directions=2),
        feature_axes=axes,
        feature_weights=np.array([[0.0, 0, 0, 1], [0, 0, 0, 7]], np.float32),
        codes=np.array([[2.0, 0]], np.float32),
    )
    expected = np.ones(4) + np.array([0, 0, 0, 2 * 0.5 * (5 - centre[1])])
    np.testing.assert_allclose(form.of(["a"], None, strange), expected, atol=1e-3)
    np.testing.assert_allclose(form.of(["a"], None, cells(1, 1, 1, 9)), [1, 1, 2, 1], atol=1e-6)


def test_the_average_of_two_estimates_has_the_size_that_they_say() -> None:
    """Estimates t + noise of the right size each: the average that is nearest to t is found without t."""
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 20000))
    shared, first, second = parts[0], 0.5 * parts[1], 0.5 * parts[2]
    truth = shared + first + second + rng.normal(size=20000)
    one, other = shared + first, shared + second  # E[truth | one] = one
    effects = known([("a",)], [np.nan], np.zeros((1, 20000)))
    found = effects.joined(one, other)
    mean = (one + other) / 2
    assert found / mean == pytest.approx(np.full(20000, truth @ mean / (mean @ mean)), rel=0.03)
    assert effects.joined(one, one) == pytest.approx(one)
    assert effects.joined(one, None) is one
    assert replace(effects, pooling=EffectPooling(flow=0.0)).joined(one, other) is one
    assert effects.joined(parts[0], parts[1]) == pytest.approx(MOST_LARGER * (parts[0] + parts[1]) / 2)


def test_estimates_from_the_same_cells_are_not_enlarged() -> None:
    effects, flow = in_contexts(), np.array([1.0, -1, 2, 3])
    own, strange = cells(1, 1, 1, 9), cells(1, 5, 1, 5)
    np.testing.assert_allclose(effects.of(["a"], None, own, flow), (effects.of(["a"], None, own) + flow) / 2, atol=1e-6)
    away = effects.of(["a"], None, strange)
    larger = effects.of(["a"], None, strange, flow) / ((away + flow) / 2)
    assert larger == pytest.approx(MOST_LARGER, rel=1e-2)
    alone = known([("a",)], [np.nan], np.ones((1, 4)))
    np.testing.assert_allclose(alone.of(["a"], None, cells(9, 9, 9, 9), flow), (1 + flow) / 2)


def test_the_flow_is_not_asked_about_targets_that_it_was_not_trained_on() -> None:
    effects = known([("a",), ("b",)], [np.nan] * 2, np.array([[1.0, 0], [0, 1.0]]))
    flow = np.array([3.0, 3.0])
    assert effects.of(["new"], None, flow=flow) == pytest.approx([0.5, 0.5])
    assert effects.of(["a", "new"], None, flow=flow) == pytest.approx([1.5, 0.5])
    assert effects.of(["a", "b"], None, flow=flow) == pytest.approx(effects.joined(np.ones(2), flow))


def test_the_average_effect_does_not_hold_the_knock_downs_of_targets_themselves() -> None:
    """Each of four targets turns itself off and moves gene 4 alike."""
    values = np.zeros((4, 6))
    values[:, 4] = 1.0
    values[np.arange(4), np.arange(4)] = -3.0
    names = [f"g{number}" for number in range(4)]
    effects = known([(name,) for name in names], [np.nan] * 4, values)
    effects = replace(effects, pooling=EffectPooling(knock_down=float(np.log(0.1))))
    members = Known(targets={**{name: number for number, name in enumerate(names)}, "new": 5})
    controls = Controls(np.full(6, 20.0), np.zeros(6))
    found = effects.of(["new"], None, controls, members=members)
    assert found[4] == pytest.approx(1.0)
    assert found[5] == pytest.approx(np.log1p(2.0) - np.log1p(20.0))  # a tenth of what there is is left
    # In the place of each one's own knock-down stands the average over all targets, -3 / 4, of which a quarter is left.
    np.testing.assert_allclose(found[:4], -3 / 16)


def test_an_unseen_target_is_predicted_from_others_with_like_vectors() -> None:
    rng = np.random.default_rng(0)
    vectors, response = rng.normal(size=(21, 3)), rng.normal(size=(3, 40))
    values = vectors @ response + 0.1 * rng.normal(size=(21, 40))
    names = [f"p{number}" for number in range(21)]
    members = Known(vectors={name: row.astype(np.float32) for name, row in zip(names, vectors, strict=True)})
    effects = known([(name,) for name in names[:20]], [np.nan] * 20, values[:20])
    found = effects.of([names[20]], None, members=members)
    assert np.corrcoef(found, values[20])[0, 1] > 0.95
    few = known([(name,) for name in names[:5]], [np.nan] * 5, values[:5])
    np.testing.assert_allclose(few.of([names[20]], None, members=members), values[:5].mean(0), rtol=1e-4, atol=1e-6)


def test_the_strength_for_unseen_targets_is_that_which_predicts_left_out_ones_best() -> None:
    """As fits without each of seven perturbations in turn tell."""

    def predict(x: np.ndarray, y: np.ndarray, w: np.ndarray, at: np.ndarray, ridge: float) -> np.ndarray:
        centre, mean = w @ x / w.sum(), w @ y / w.sum()
        x = x - centre
        if np.isinf(ridge):
            return mean
        return mean + np.linalg.solve(x.T @ np.diag(w) @ x + ridge * np.eye(3), x.T @ (w[:, None] * (y - mean))).T @ (
            at - centre
        )

    chosen = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, w = rng.normal(size=(8, 3)).astype(np.float32).astype(float), rng.integers(20, 80, 8).astype(float)
        y = (0.6 * x @ rng.normal(size=(3, 9)) + rng.normal(size=(8, 9))).astype(np.float32).astype(float)
        names = [f"p{number}" for number in range(8)]
        members = Known(vectors={name: row.astype(np.float32) for name, row in zip(names, x, strict=True)})
        effects = replace(known([(name,) for name in names[:7]], [np.nan] * 7, y[:7]), cells=w[:7].astype(np.float32))
        weight = w[:7] / w[:7].mean()
        errors = []
        for ridge in RIDGES:
            off = [
                weight[at]
                * (y[at] - predict(*(np.delete(part, at, 0) for part in (x[:7], y[:7], weight)), x[at], ridge)) ** 2
                for at in range(7)
            ]
            errors.append(np.sum(off))
        chosen.append(RIDGES[int(np.argmin(errors))])
        expected = predict(x[:7], y[:7], weight, x[7], chosen[-1])
        np.testing.assert_allclose(effects.of(["p7"], None, members=members), expected, rtol=1e-3, atol=1e-3)
    assert len(set(chosen)) > 1


def test_perturbations_of_many_cells_weigh_more_in_the_average() -> None:
    effects = known([("a",), ("b",)], [np.nan] * 2, np.array([[4.0], [0.0]]))
    effects = replace(effects, cells=np.array([30, 10], np.float32))
    assert effects.of(["new"], None) == pytest.approx([3.0])


def test_tables_give_back_the_effects() -> None:
    effects = replace(in_contexts(), pooling=EffectPooling(width=2.0), contexts=[0, 1, 2])
    effects = replace(effects, pool=replace(effects.pool, width=2.0))
    held = effects.tables()
    empty = AverageEffects.empty(1, 4, contexts=3, own=3)
    empty.load_state_dict(held.state_dict())
    read = Effects.of_tables(empty, effects.named(), effects.pooling)
    strange = cells(1, 5, 1, 5)
    np.testing.assert_array_equal(read.of(["a"], None, strange), effects.of(["a"], None, strange))
    assert {name: table.dtype for name, table in empty.named_buffers()} == {
        name: table.dtype for name, table in held.named_buffers()
    }
    assert held.own_of.dtype == torch.int64
