from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from bgen.evaluate.metrics import counts as c


def random_counts(seed: int, cells: int = 300, genes: int = 50) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    rate = np.random.default_rng(99).gamma(1.0, 1.0, size=genes) * rng.lognormal(0, 0.4, size=(cells, 1))
    return sparse.csr_matrix(rng.poisson(rate).astype(np.float32))


def test_moments_are_those_of_numpy() -> None:
    counts = random_counts(0)
    dense = counts.toarray().astype(np.float64)
    moments = c.gene_moments(counts)
    np.testing.assert_allclose(moments.mean, dense.mean(axis=0))
    np.testing.assert_allclose(moments.variance, dense.var(axis=0, ddof=1))
    np.testing.assert_allclose(moments.zeros, (dense == 0).mean(axis=0))
    np.testing.assert_array_equal(c.genes_per_cell(counts), (dense > 0).sum(axis=1))
    with pytest.raises(ValueError, match="two cells"):
        c.gene_moments(counts[:1])


def test_spearman() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    assert c.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert c.spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert c.spearman(a, np.ones(30)) == 0.0


def test_moment_scores() -> None:
    real = random_counts(0)
    genes = np.arange(50)
    moments = c.gene_moments(real)
    itself = c.moment_scores(moments, moments, genes)
    assert all(itself[f"{name}_spearman"] == pytest.approx(1.0) for name in ("mean", "variance", "zeros"))
    assert all(itself[f"{name}_rmse"] == 0.0 for name in ("mean", "variance", "zeros"))
    doubled = c.moment_scores(moments, c.gene_moments(real * 2), genes)
    assert doubled["mean_rmse"] == pytest.approx(np.log10(2), rel=0.02)
    assert doubled["variance_rmse"] == pytest.approx(np.log10(4), rel=0.02)
    assert doubled["zeros_rmse"] == 0.0
    with pytest.raises(ValueError, match="300 and 200 cells"):
        c.moment_scores(moments, c.gene_moments(real[:200]), genes)


def test_rmse_by_hand_and_genes_that_one_side_never_saw() -> None:
    assert c.log10_rmse(np.array([0.0, 1.0]), np.array([0.99, 1.0]), 0.01) == pytest.approx(np.sqrt(2.0))


def test_ks_distances() -> None:
    a, b = random_counts(0), random_counts(1)
    sums = [np.asarray(x.sum(axis=1), np.float64).ravel() for x in (a, b)]  # scipy keeps what it is given
    assert c.library_ks(a, b) == pytest.approx(stats.ks_2samp(*sums).statistic)
    assert c.library_ks(a, a * 1000) == 1.0
    assert c.genes_ks(a, a * 1000) == 0.0
    assert c.ks_distance(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 4.0, 5.0, 6.0])) == 0.5


def test_gene_choices() -> None:
    dense = np.zeros((100, 4))
    dense[:, 0] = 50  # everywhere, and varies least
    dense[::2, 1] = 40
    dense[0, 2] = 1
    counts = sparse.csr_matrix(dense)
    np.testing.assert_array_equal(c.expressed_genes(counts, 0.02), [0, 1])
    np.testing.assert_array_equal(c.expressed_genes(counts, 0.01), [0, 1, 2])
    np.testing.assert_array_equal(c.variable_genes(counts, 1), [1])
    assert len(c.variable_genes(counts, 10)) == 4


def test_correlation_is_that_of_numpy_and_constant_genes_correlate_with_none() -> None:
    counts = random_counts(0)
    counts = sparse.csr_matrix(sparse.hstack([counts, sparse.csr_matrix((300, 1))]))
    genes = np.array([3, 10, 20, 50])
    from bgen.genes.expression import log_cp10k

    expected = np.corrcoef(log_cp10k(counts).toarray()[:, genes[:3]].T)
    got = c.correlation(counts, genes)
    np.testing.assert_allclose(got[:3, :3], expected, atol=1e-6)
    np.testing.assert_array_equal(got[3], 0.0)


def test_independent_genes_lose_all_correlation() -> None:
    rng = np.random.default_rng(0)
    programme = rng.lognormal(0, 1.0, size=(2000, 2)).repeat(10, axis=1)
    real = rng.poisson(programme * 5)
    shuffled = rng.permuted(real, axis=0)
    genes = np.arange(20)
    csr = sparse.csr_matrix
    # Normalising by the library leaves a little correlation even between shuffled genes.
    assert c.correlation_difference(csr(real), csr(shuffled), genes) == pytest.approx(1.0, abs=0.15)
    assert c.correlation_difference(csr(real), csr(real), genes) == 0.0
    assert c.correlation_difference(csr(real[:1000]), csr(real[1000:]), genes) < 0.2
    with pytest.raises(ValueError, match="do not vary"):
        c.correlation_difference(csr(np.ones((20, 20))), csr(real[:20]), genes)
