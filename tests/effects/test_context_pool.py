"""Contexts count by how alike their control cells are: formulas, and cells that are recognised."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.effects.context_pool import NEAR, ContextPool, Controls, controls_of, kernel

GENES = 60


def pool(spread: float = 1.0, noise: float = 0.0, width: float = np.inf) -> ContextPool:
    logs = spread * np.random.default_rng(0).normal(size=(4, GENES)).astype(np.float32) + 3
    return ContextPool(logs, np.full(4, noise), np.zeros_like(logs), width)


def at(logs: np.ndarray) -> Controls:
    return Controls(np.expm1(logs.astype(np.float64)), np.zeros(len(logs)))


def test_weights_fall_with_the_square_of_the_distance() -> None:
    away = np.array([1.0, 3.0, 9.0])
    expected = np.exp(-away / 2)
    np.testing.assert_allclose(kernel(away, 2.0), expected / expected.sum())
    np.testing.assert_allclose(kernel(away, np.inf), 1 / 3)
    assert kernel(np.array([0.0, 5.0]), 0.0).tolist() == [1, 0]


def test_cells_of_a_context_are_recognised_and_others_are_not() -> None:
    contexts = pool()
    seen, _, sure = contexts.weights(contexts.distances(at(contexts.logs[2])), np.arange(4))
    assert seen[2] > 0.9
    assert sure > 0.99
    strange = at(np.full(GENES, 3.0) + np.random.default_rng(9).normal(size=GENES))
    _, alike, sure = contexts.weights(contexts.distances(strange), np.arange(4))
    assert sure < 0.2
    assert alike.tolist() == [0.25] * 4


def test_distances_are_freed_of_sampling_noise() -> None:
    """Different cells of one population are at no distance, few cells as many: what is left is chance."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.full(GENES, 2.0), 2)
    drawn = [controls_of(sp.csr_matrix(rng.multinomial(800, shares[0], 40).astype(np.float32))) for _ in range(40)]
    raw = [((a.logs - b.logs) ** 2).sum() for a, b in zip(drawn[:20], drawn[20:], strict=True)]
    freed = [((a.logs - b.logs) ** 2).sum() - a.noise - b.noise for a, b in zip(drawn[:20], drawn[20:], strict=True)]
    assert abs(np.mean(freed)) < 0.25 * np.mean(raw)
    logs = np.array([drawn[0].logs], np.float32)
    contexts = ContextPool(logs, np.array([drawn[0].noise]), np.zeros_like(logs))
    other = controls_of(sp.csr_matrix(rng.multinomial(800, shares[1], 40).astype(np.float32)))
    assert contexts.distances(other)[0] > 10 * contexts.distances(drawn[1])[0]
    assert (contexts.distances(drawn[1]) >= 0).all()


def test_what_is_near_is_measured_by_how_far_contexts_are_apart() -> None:
    contexts = pool()
    between = contexts.between()
    np.testing.assert_allclose(between[0], contexts.distances(at(contexts.logs[0])), atol=1e-3)
    np.fill_diagonal(between, np.inf)
    assert contexts.near() == pytest.approx(NEAR * np.median(between.min(1)), rel=1e-4)
    assert pool(2.0).near() == pytest.approx(4 * contexts.near(), rel=1e-3)
