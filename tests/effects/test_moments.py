"""Moments of groups: the textbook's, whatever the batches, and errors that are those of repeated measurements."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.effects.moments import LEAST_MOLECULES, Accumulator, GroupMoments, moments_of


def cells(seed: int = 0, n: int = 200, genes: int = 12) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(rng.uniform(0.2, 4, genes), (n, genes)).astype(np.float32))
    return counts, rng.integers(0, 3, n), rng.integers(-1, 2, n)


def test_moments_are_those_of_the_textbook() -> None:
    counts, context, label = cells()
    found = moments_of(counts, context, label)
    assert sorted(zip(found.context, found.label, strict=True)) == list(zip(found.context, found.label, strict=True))
    assert found.cells.sum() == 200
    dense = counts.toarray().astype(np.float64)
    for at in range(len(found.cells)):
        mine = dense[(context == found.context[at]) & (label == found.label[at])]
        shares = 1e4 * mine / mine.sum(1, keepdims=True)
        np.testing.assert_allclose(found.mean[at], shares.mean(0), rtol=1e-5)
        least = LEAST_MOLECULES * 1e4 / mine.sum()
        np.testing.assert_allclose(found.variance[at], shares.var(0, ddof=1) / len(mine) + least**2, rtol=1e-4)


def test_batches_in_any_order_give_the_same() -> None:
    counts, context, label = cells()
    sums = Accumulator(counts.shape[1])
    for rows in np.array_split(np.random.default_rng(1).permutation(200), 7):
        sums.add(counts[rows], context[rows], label[rows])
    found, expected = sums.finish(), moments_of(counts, context, label)
    assert found.label.tolist() == expected.label.tolist()
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-5)


def test_variances_are_those_of_repeated_measurements() -> None:
    rng = np.random.default_rng(2)
    means, variances = [], []
    for _ in range(300):
        counts = sp.csr_matrix(rng.poisson(np.linspace(1, 5, 10), (40, 10)).astype(np.float32))
        found = moments_of(counts, *zeros(40))
        means.append(found.mean[0])
        variances.append(found.variance[0])
    ratio = np.mean(variances, axis=0) / np.var(means, axis=0)
    assert np.median(ratio) == pytest.approx(1, abs=0.1)


def zeros(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(n, np.int64), np.zeros(n, np.int64)


def test_one_cell_is_as_uncertain_as_a_cell_of_another_group() -> None:
    counts, _, _ = cells(n=61)
    label = np.r_[np.zeros(60, np.int64), 1]
    found = moments_of(counts, np.zeros(61, np.int64), label)
    assert np.median(found.variance[1] / found.variance[0]) == pytest.approx(60, rel=0.3)


def test_pooled_groups_are_one_group() -> None:
    counts, context, label = cells(n=600)
    pooled = moments_of(counts, context, label).pooled()
    whole: GroupMoments = moments_of(counts, *zeros(600))
    np.testing.assert_allclose(pooled[0], whole.mean[0], rtol=1e-5)
    np.testing.assert_allclose(pooled[1], whole.variance[0], rtol=0.15)
