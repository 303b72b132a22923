"""Effects are shrunk by as much as their size among all genes tells."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.effects.estimates import shrink


def test_one_gene_alone_is_no_evidence_that_genes_respond() -> None:
    (kept,) = shrink(np.array([0.2]), np.array([0.1]))
    assert kept < 0.6 * 0.2  # without the cell of evidence for no effect: 0.75
    several = shrink(np.full(50, 0.2), np.full(50, 0.1))
    assert several.mean() > 0.7 * 0.2


def test_few_effects_are_kept_and_noise_goes() -> None:
    rng = np.random.default_rng(1)
    truth = np.zeros(1000)
    truth[:10] = rng.choice([-1.0, 1.0], 10)
    error = np.full(1000, 0.1)
    estimate = truth + 0.1 * rng.normal(size=1000)
    kept = shrink(estimate, error)
    assert np.abs(kept[:10] - truth[:10]).max() < 0.25
    assert np.abs(kept[10:]).mean() < 0.1 * np.abs(estimate[10:]).mean()


def test_where_all_genes_respond_little_is_shrunk() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=1000)
    kept = shrink(truth + 0.1 * rng.normal(size=1000), np.full(1000, 0.1))
    assert np.polyfit(truth, kept, 1)[0] == pytest.approx(1 / 1.01, abs=0.03)


def test_many_genes_are_shrunk_as_a_part_of_them_tells() -> None:
    rng = np.random.default_rng(4)
    estimate = np.where(rng.random(12000) < 0.1, rng.normal(size=12000), 0.0) + 0.2 * rng.normal(size=12000)
    error = np.full(12000, 0.2)
    few = shrink(estimate[:3000], error[:3000])
    np.testing.assert_allclose(shrink(estimate, error)[:3000], few, atol=0.08)
