"""What vectors of genes foretell, and how well."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.genes.foretell import fit_ridge, left_out_r2


def some_genes(noise: float, genes: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((genes, 8))
    return vectors, 2 + vectors @ np.linspace(-1, 1, 8) + noise * rng.standard_normal(genes)


def test_a_linear_number_is_foretold() -> None:
    vectors, numbers = some_genes(0.01)
    ridge = fit_ridge(vectors[:300], numbers[:300])
    inside = np.abs(numbers[300:] - 2) < 2
    np.testing.assert_allclose(ridge(vectors[300:])[inside], numbers[300:][inside], atol=0.05)
    assert left_out_r2(vectors, numbers) > 0.99


def test_r2_is_that_of_genes_that_were_left_out() -> None:
    vectors, numbers = some_genes(2.0)
    signal = float(np.square(np.linspace(-1, 1, 8)).sum())
    assert left_out_r2(vectors, numbers) == pytest.approx(signal / (signal + 4), abs=0.08)
    rng = np.random.default_rng(1)
    assert left_out_r2(rng.standard_normal((60, 40)), rng.standard_normal(60)) < 0.05  # no credit for fitting noise


def test_without_a_gain_the_mean_is_the_answer() -> None:
    rng = np.random.default_rng(2)
    vectors, numbers = rng.standard_normal((200, 30)), rng.standard_normal(200)
    assert np.ptp(fit_ridge(vectors, numbers)(vectors)) < 0.5
    assert (fit_ridge(vectors[:10], numbers[:10])(vectors) == numbers[:10].mean()).all()
    assert left_out_r2(vectors[:10], numbers[:10]) == 0


def test_nothing_lies_outside_of_what_was_seen() -> None:
    vectors, numbers = some_genes(0.01)
    far = fit_ridge(vectors, numbers)(100 * vectors)
    assert numbers.min() <= far.min() <= far.max() <= numbers.max()
