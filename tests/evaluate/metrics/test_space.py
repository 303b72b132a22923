from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from bgen.evaluate.metrics.space import fit_space
from bgen.genes.expression import library_size, log_cp10k


def poisson(seed: int, cells: int = 120, genes: int = 40) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.5, 1.0, size=genes) * rng.lognormal(0, 0.5, size=(cells, 1))
    rate[: cells // 2, :5] *= 6
    return sparse.csr_matrix(rng.poisson(rate))


def test_log_cp10k() -> None:
    counts = sparse.csr_matrix(np.array([[1, 3, 0], [0, 0, 0], [0, 5, 0]]))
    expected = np.log1p([[2500.0, 7500.0, 0], [0, 0, 0], [0, 10000.0, 0]])
    np.testing.assert_allclose(log_cp10k(counts).toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(library_size(counts), [4, 0, 5])


def test_sparse_fit_equals_dense_pca_and_projects_with_the_training_mean() -> None:
    train, test = poisson(0), poisson(1)
    space = fit_space(train, components=5)
    dense = PCA(5, svd_solver="full").fit(log_cp10k(train).toarray())
    expected = dense.transform(log_cp10k(test).toarray())
    got = space.project(test)
    assert got.dtype == np.float32
    signs = np.sign((got * expected).sum(axis=0))
    np.testing.assert_allclose(got * signs, expected, atol=2e-3)
    np.testing.assert_allclose(space.project(train).mean(axis=0), 0.0, atol=1e-4)
    assert np.abs(space.project(test).mean(axis=0)).max() > 0.01  # not re-centred on what is projected


def test_deterministic() -> None:
    np.testing.assert_array_equal(fit_space(poisson(0)).components, fit_space(poisson(0)).components)


def test_small_data_give_fewer_components() -> None:
    assert fit_space(poisson(0, cells=8), components=30).components.shape == (7, 40)
    with pytest.raises(ValueError, match="at least two cells"):
        fit_space(poisson(0, cells=1))


def test_other_genes_are_refused() -> None:
    with pytest.raises(ValueError, match="40 genes, not 39"):
        fit_space(poisson(0)).project(poisson(0, genes=39))
