"""Grouping by parts gives what sorting everything gives, and takes no memory for each row."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bgen.order import groups
from bgen.order.groups import Groups
from bgen.order.trajectories import Trajectories


def plain(columns: list[NDArray[Any]], n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the rows in order and the edges of the groups, as NumPy's sort gives them."""
    order = np.lexsort([*columns[::-1], np.zeros(n)])[:n] if not columns else np.lexsort(columns[::-1])
    new = np.zeros(n, bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[order][1:] != column[order][:-1]
    return order, np.append(np.flatnonzero(new), n)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 120), st.integers(0, 3), st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_as_sorting_gives_them(n: int, columns: int, levels: int, part: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [np.int8, np.float32, np.int64]
    values = [(rng.integers(-1, levels, n)).astype(kind) for kind in kinds[:columns]]
    known = rng.random(n) < 0.8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "PART", part)
        found = Groups([lambda rows, v=v: v[rows] for v in values], n, lambda rows: known[rows])
        line = np.zeros(found.edges[-1], np.uint32)
        found.fill(line, lambda rows: np.arange(n)[rows])
        counted = found.count(lambda rows: np.arange(n)[rows] % 2 == 0)
    kept = np.flatnonzero(known)
    order, edges = plain([column[kept] for column in values], len(kept))
    assert np.array_equal(line, kept[order])
    assert found.edges.tolist() == (edges.tolist() if len(kept) else [0])
    assert np.array_equal(found.first, kept[order][edges[:-1]] if len(kept) else [])
    if len(kept):
        assert np.array_equal(counted, np.add.reduceat((kept[order] % 2 == 0).astype(int), edges[:-1]))


def test_a_range_of_cells_and_their_numbers_are_the_same() -> None:
    rng = np.random.default_rng(0)
    system, time = rng.integers(0, 3, 500).astype(np.int8), rng.integers(0, 4, 500).astype(np.float32)
    one = Trajectories.over_time(range(70, 570), [system], time, time < 0)
    other = Trajectories.over_time(np.arange(70, 570), [system], time, time < 0)
    assert np.array_equal(one.cells, other.cells)
    assert one.cells.min() == 70
    assert one.cells.dtype == np.uint32
    assert one.population(3).dtype == np.int64


def test_numbers_beyond_32_bits_are_kept() -> None:
    n, first = 100, (1 << 32) - 50
    found = Trajectories.over_time(range(first, first + n), [], np.zeros(n), np.zeros(n, bool))
    assert found.cells.dtype == np.int64
    assert np.array_equal(found.cells, np.arange(first, first + n))


@pytest.mark.parametrize("along", ["time", "perturbation"])
def test_four_bytes_a_cell(along: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "PART", 4096)
    peaks = []
    for n in (100_000, 200_000, 200_000):  # the first also compiles
        rng = np.random.default_rng(0)
        system, label = rng.integers(0, 5, n).astype(np.int8), rng.integers(0, 9, n).astype(np.int8)
        time, never = rng.integers(0, 4, n).astype(np.float32), np.zeros(n, bool)
        tracemalloc.start()
        if along == "time":
            found = Trajectories.over_time(range(n), [system], time, never)
        else:
            found = Trajectories.along_perturbation(range(n), [system], label, 0, time, time)
        found.shuffled_within(np.broadcast_to(np.uint8(0), n), by_cell=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[0]) / 100_000 < 4.5
