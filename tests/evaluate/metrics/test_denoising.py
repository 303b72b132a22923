"""Molecular cross-validation and mixing of batches, against what is known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.evaluate.metrics.denoising import molecular_cross_validation, poisson_deviance, split_molecules
from bgen.evaluate.metrics.mixing import batch_mixing


def test_molecules_are_split_in_halves_that_add_up() -> None:
    counts = sp.random(50, 40, density=0.3, random_state=0, format="csr")
    counts.data = np.ceil(20 * counts.data)
    first, second = split_molecules(counts, 0)
    assert abs(first + second - counts).nnz == 0
    assert first.sum() / counts.sum() == pytest.approx(0.5, abs=0.03)


def test_deviance_is_the_textbooks() -> None:
    counts = np.array([[0.0, 2.0], [1.0, 0.0]])
    expected = np.array([[0.5, 1.0], [1.0, 2.0]])
    terms = 2 * (np.where(counts > 0, counts * np.log(np.maximum(counts, 1e-9) / expected), 0) - (counts - expected))
    assert poisson_deviance(sp.csr_matrix(counts), expected) == pytest.approx(terms.sum(1))


def test_the_true_mean_beats_all_others() -> None:
    rng = np.random.default_rng(0)
    profiles = rng.dirichlet(np.full(60, 0.5), 3)
    kind = rng.integers(3, size=300)
    counts = sp.csr_matrix(rng.poisson(400 * profiles[kind]).astype(np.float64))
    scores = molecular_cross_validation(counts, {"truth": lambda _: 200 * profiles[kind]})
    means = {name: values.mean() for name, values in scores.items()}
    assert means["truth"] < means["pca"] < means["mean"] < means["raw"]


def test_mixing_is_one_for_equal_batches_and_zero_for_separate_ones() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(600, 4)).astype(np.float32)
    batches = rng.integers(3, size=600)
    assert batch_mixing(points, batches) == pytest.approx(1, abs=0.05)
    assert batch_mixing(points + 100 * batches[:, None].astype(np.float32), batches) == 0


def test_a_cell_is_no_neighbour_of_its_own() -> None:
    """All others are neighbours here, and two of three are of the other batch: as in perfect mixing."""
    points = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    assert batch_mixing(points, ["a", "b", "b", "a"]) == pytest.approx(1)
