from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from bgen.evaluate.protocols.baselines import fit_type_negative_binomial

SHARE = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.4, 0.4]])
ALPHA = np.array([[0.5, 0.0, 1.0, 0.0], [0.2, 0.8, 0.0, 0.3]])
LOG_LIBRARY = np.array([[5.0, 0.3], [6.0, 0.1]])


def known(cells: int, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Counts whose library is given and not the sum: a fifth gene fills up, far larger than the noise of the others."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, size=cells)
    library = np.round(np.exp(rng.normal(LOG_LIBRARY[kind, 0], LOG_LIBRARY[kind, 1])) * 1000)
    alpha = ALPHA[kind]
    gamma = np.where(alpha > 0, rng.gamma(1 / np.maximum(alpha, 1e-9), np.maximum(alpha, 1e-9)), 1.0)
    x = rng.poisson(library[:, None] / 1000 * SHARE[kind] * gamma)
    x = np.concatenate([x, (library - x.sum(axis=1))[:, None]], axis=1)
    return sparse.csr_matrix(x.astype(np.float64)), np.array(["a", "b"])[kind]


def test_recovers_shares_dispersions_and_libraries() -> None:
    counts, labels = known(20_000)
    fit = fit_type_negative_binomial(counts, labels)
    assert fit.types == ("a", "b")
    np.testing.assert_allclose(fit.share[:2, :4] * 1000, SHARE, atol=0.01)
    np.testing.assert_allclose(fit.dispersion[:2, :4][SHARE > 0], ALPHA[SHARE > 0], atol=0.05)
    np.testing.assert_allclose(fit.log_library_mean[:2] - np.log(1000), LOG_LIBRARY[:, 0], atol=0.02)
    np.testing.assert_allclose(fit.log_library_sd[:2], LOG_LIBRARY[:, 1], atol=0.01)
    np.testing.assert_allclose(fit.share.sum(axis=1), 1.0)


def test_samples_have_the_fitted_moments() -> None:
    rng = np.random.default_rng(0)
    library = np.exp(rng.normal(7.0, 0.4, size=4000))
    shares = rng.dirichlet(np.full(30, 0.5))
    x = rng.poisson(library[:, None] * shares * rng.gamma(2.0, 0.5, size=(4000, 30)))
    fit = fit_type_negative_binomial(sparse.csr_matrix(x), np.full(4000, "t"))
    drawn = fit.sample(np.full(4000, "t"), seed=1).toarray()
    big = x.mean(axis=0) > 1
    np.testing.assert_allclose(drawn.mean(axis=0)[big], x.mean(axis=0)[big], rtol=0.08)
    np.testing.assert_allclose(drawn.var(axis=0)[big], x.var(axis=0)[big], rtol=0.35)
    np.testing.assert_allclose((drawn == 0).mean(axis=0)[big], (x == 0).mean(axis=0)[big], atol=0.04)


def test_labels_keep_their_order_and_the_seed_decides() -> None:
    counts, labels = known(2000)
    fit = fit_type_negative_binomial(counts, labels)
    wanted = np.array(["b", "a"] * 700)
    drawn = fit.sample(wanted, seed=3)
    assert drawn.shape == (1400, 5)
    assert drawn.dtype == np.int32
    assert drawn.data.min() > 0
    assert (drawn.toarray()[1::2, 3] == 0).all()  # type a never expresses gene 3
    assert (drawn.toarray()[::2, 3] > 0).mean() > 0.9
    assert (drawn != fit.sample(wanted, seed=3)).nnz == 0
    assert (drawn != fit.sample(wanted, seed=4)).nnz > 0


def test_a_type_that_train_does_not_hold_is_drawn_from_all_cells() -> None:
    counts, labels = known(2000)
    drawn = fit_type_negative_binomial(counts, labels).sample(["new"] * 500, seed=0)
    assert 0.5 < (drawn.toarray()[:, 3] > 0).mean() <= 1.0


def test_wrong_number_of_labels() -> None:
    with pytest.raises(ValueError, match="3 labels for 10 cells"):
        fit_type_negative_binomial(sparse.csr_matrix(np.ones((10, 2))), ["a", "b", "c"])


def test_empty_cells_are_drawn_empty() -> None:
    counts = sparse.csr_matrix(np.array([[0, 0], [0, 0], [3, 2], [4, 1]]))
    drawn = fit_type_negative_binomial(counts, ["empty", "empty", "full", "full"]).sample(["empty", "full"], seed=0)
    assert drawn[0].nnz == 0
    assert drawn[1].sum() > 0
