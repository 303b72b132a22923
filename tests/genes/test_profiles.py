"""Profiles of genes over groups of cells."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.errors import UserError
from bgen.genes.profiles import LEAST, profiles


def cells() -> tuple[sp.csr_matrix, np.ndarray]:
    rng = np.random.default_rng(0)
    groups = np.array(["a"] * 30 + ["b"] * 40 + ["c"] * 5)
    rate = np.where((groups == "a")[:, None], [4, 1, 2, 0, 3], [1, 4, 2, 0, 3])
    return sp.csr_matrix(rng.poisson(rate).astype(np.float32)), groups


def test_levels_and_deviations_are_those_of_mean_shares() -> None:
    counts, groups = cells()
    found = profiles(counts, groups)
    assert found.groups == ["a", "b"]  # c is too small
    dense = counts.toarray()
    shares = 1e4 * dense / dense.sum(1, keepdims=True)
    logs = np.log(np.stack([shares[groups == name].mean(0) for name in "ab"], 1) + LEAST)
    np.testing.assert_allclose(found.level, logs.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.deviation, logs - logs.mean(1, keepdims=True), atol=1e-6)
    assert found.seen.tolist() == [True, True, True, False, True]


def test_components_are_those_of_the_genes_that_are_named() -> None:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(2.0, (120, 40)).astype(np.float32))
    found = profiles(counts, np.repeat(["a", "b", "c"], 40))
    targets, weights = found.targets(np.arange(30), 4)
    assert targets.shape == (40, 3)  # the level, and two components of three groups
    np.testing.assert_allclose(
        targets[:30, 1:].T @ targets[:30, 1:] / 30, np.cov(targets[:30, 1:].T, bias=True), atol=1e-12
    )
    assert abs(np.corrcoef(targets[:30, 1:].T)[0, 1]) < 1e-9
    assert weights[:2].tolist() == [1, 1]
    assert 0 < weights[2] < 1
    found.deviation[35] += [9, -9, 0]  # a gene that is held out
    np.testing.assert_array_equal(found.targets(np.arange(30), 4)[0][:30], targets[:30])


def test_one_group_is_too_few() -> None:
    counts, groups = cells()
    with pytest.raises(UserError, match="two groups of 20 cells"):
        profiles(counts, np.where(groups == "c", "c", "b"))
