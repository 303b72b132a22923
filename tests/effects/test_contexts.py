"""Baselines from the control cells of a context, against formulas and on contexts that obey them."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.effects.contexts import (
    BILINEAR,
    NEAREST,
    RIDGE,
    SIMILAR,
    Contexts,
    bilinear_on_controls,
    choose_bilinear,
    choose_ridge,
    choose_sharpness,
    context_effects,
    nearest_context,
    read_contexts,
    ridge_on_controls,
    similar_contexts,
)

KEYS = [((f"p{number}",), None) for number in range(6)]


def atlas(seed: int, n: int = 10, *, noise: float = 0.02) -> tuple[Contexts, np.ndarray, np.ndarray]:
    """Contexts whose effects are (I + M(control mean)) times the perturbation's own; one more, and its effects."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(15, 2)))[0].T
    state = rng.normal(size=(n + 1, 2))
    control = 2.0 + state @ axes
    own = rng.normal(size=(len(KEYS), 15))
    responses = rng.normal(0, 0.15, (2, 15, 15))
    turned = np.einsum("ck,kgh,ph->cpg", state, responses, own)
    effects = own + turned + noise * rng.normal(size=turned.shape)
    return Contexts(control[:-1], effects[:-1].astype(np.float32), KEYS), control[-1], effects[-1]


def test_formulas_of_neighbours() -> None:
    control = np.array([[0.0, 0], [1, 0], [4, 0]])
    effects = np.array([[[1.0, 0]], [[0, 1.0]], [[5, 5.0]]], np.float32)
    contexts = Contexts(control, effects, KEYS[:1])
    assert nearest_context(contexts, np.array([0.6, 0]), 0).tolist() == [0, 1]
    assert similar_contexts(contexts, np.array([0.6, 0]), 0, 0.0) == pytest.approx([2, 2])
    distance = np.array([0.36, 0.16, 3.4**2])
    pairs = np.array([1, 16, 9.0])
    weights = np.exp(-2.0 * distance / pairs.mean())
    assert similar_contexts(contexts, np.array([0.6, 0]), 0, 2.0) == pytest.approx(
        weights / weights.sum() @ effects[:, 0]
    )


def test_ridge_is_that_of_the_textbook() -> None:
    contexts, control, _ = atlas(0, 5)
    x = contexts.control - contexts.control.mean(0)
    scale = np.sqrt((x**2).sum(1).mean())
    y = contexts.effects[:, 1].astype(float)
    weights = np.linalg.solve(x.T @ x / scale**2 + 0.3 * np.eye(15), x.T @ (y - y.mean(0)) / scale)
    expected = y.mean(0) + (control - contexts.control.mean(0)) / scale @ weights
    np.testing.assert_allclose(ridge_on_controls(contexts, control, 1, 0.3), expected)
    np.testing.assert_allclose(ridge_on_controls(contexts, control, 1, np.inf), y.mean(0))
    np.testing.assert_allclose(bilinear_on_controls(contexts, control, np.inf)[1], y.mean(0))


def test_what_obeys_the_model_is_found_and_noise_is_not() -> None:
    contexts, control, real = atlas(1)
    mean = contexts.effects.mean(0)
    off = {
        "mean": mean,
        RIDGE: np.array([ridge_on_controls(contexts, control, at, choose_ridge(contexts)) for at in range(6)]),
        BILINEAR: bilinear_on_controls(contexts, control, choose_bilinear(contexts)),
    }
    errors = {name: float(((effect - real) ** 2).sum()) for name, effect in off.items()}
    assert errors[RIDGE] < 0.5 * errors["mean"]
    assert errors[BILINEAR] < 0.5 * errors["mean"]
    rng = np.random.default_rng(2)
    noise = Contexts(contexts.control, rng.normal(size=contexts.effects.shape).astype(np.float32), KEYS)
    assert choose_sharpness(noise) <= 0.5
    assert choose_ridge(noise) >= 3
    assert choose_bilinear(noise) >= 3


def test_missing_perturbations_are_left_to_the_contexts_that_have_them() -> None:
    contexts, control, real = atlas(3)
    effects = contexts.effects.copy()
    effects[:4, 2] = np.nan
    effects[1:, 5] = np.nan
    found = context_effects(Contexts(contexts.control, effects, KEYS), control, [*KEYS, (("new",), None)])
    assert set(found) == set(KEYS[:5])  # one context says nothing of how contexts differ
    assert list(found[KEYS[2]]) == [NEAREST, SIMILAR, RIDGE, BILINEAR]
    for rows in found.values():
        assert all(np.isfinite(effect).all() for effect in rows.values())
    away = ((found[KEYS[2]][BILINEAR] - real[2]) ** 2).sum()
    assert away < ((effects[4:, 2].mean(0) - real[2]) ** 2).sum()


def test_two_contexts_give_neighbours_only() -> None:
    contexts = read_contexts(
        {3: np.zeros(2), 7: np.ones(2)}, {3: {KEYS[0]: np.ones(2)}, 7: {KEYS[0]: np.zeros(2), KEYS[1]: np.ones(2)}}
    )
    found = context_effects(contexts, np.array([0.9, 0.8]), KEYS)
    assert list(found) == KEYS[:1]
    assert list(found[KEYS[0]]) == [NEAREST, SIMILAR]
    assert found[KEYS[0]][NEAREST].tolist() == [0, 0]
    assert found[KEYS[0]][SIMILAR] == pytest.approx([0.5, 0.5])  # nothing tells how much nearness matters
