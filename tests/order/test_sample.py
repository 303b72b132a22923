"""A sample of many cells: each equally likely, of few chunks, and the same sample as ever of few cells."""

from __future__ import annotations

import numpy as np
import pytest

from bgen.order.keys import hash_keys
from bgen.order.sample import SCATTERED, sample


@pytest.mark.parametrize("whole", [True, False])
def test_cells_of_few_chunks_are_each_equally_likely(whole: bool) -> None:
    # chunks of a split: some full, some with few of its cells, as at the end of a population or where two splits meet
    rng = np.random.default_rng(0)
    first_cell = np.append(0, np.cumsum(rng.integers(200, 300, 60)))
    cells = np.flatnonzero(rng.random(first_cell[-1]) < np.repeat(rng.choice([0.05, 1.0], 60), np.diff(first_cell)))
    n, times = 300, np.zeros(first_cell[-1])
    for key in range(3000):
        drawn = sample(cells, n, first_cell, key, whole=whole)
        assert len(drawn) == n
        assert (np.diff(drawn) > 0).all()
        chunks = np.unique(np.searchsorted(first_cell, drawn, side="right"))
        assert len(chunks) < (12 if whole else 24)
        times[drawn] += 1
    assert np.isin(np.flatnonzero(times), cells).all()
    # chunks come as wholes, so what is compared is the chunks, by the mean of their cells
    place = np.searchsorted(first_cell, cells, side="right") - 1
    means = (np.bincount(place, times[cells]) / np.maximum(np.bincount(place), 1))[np.unique(place)]
    expected = 3000 * n / len(cells)
    assert abs(means - expected).max() < 5 * np.sqrt(expected)
    few = np.bincount(place)[np.unique(place)] < 50
    assert 10 < few.sum() < 50
    assert abs(means[few].mean() - means[~few].mean()) < 5 * np.sqrt(expected * len(few) / few.sum() / (~few).sum())


def test_a_sample_of_not_many_cells_is_scattered() -> None:
    first_cell = np.arange(0, 10_001, 250)
    cells = np.arange(0, 10_000, 2)
    n = len(cells) // SCATTERED
    expected = np.sort(cells[np.argsort(hash_keys(3, 4, cells))[:n]])
    assert sample(cells, n, first_cell, 3, 4).tolist() == expected.tolist()
    assert sample(cells, 5000, first_cell, 3) is cells
    fewer = sample(cells, n - 1, first_cell, 3, 4)
    assert len(fewer) == n - 1
    assert len(np.unique(fewer // 250)) < 12 < 40 == len(np.unique(expected // 250))
