"""Sources drawn by weight: exact shares an epoch, and the promises of the plain order."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bgen.data.loader import CountReader, TrainLoader
from bgen.errors import UserError
from bgen.order import weighted
from bgen.order.cells import Members, Order
from bgen.order.weighted import WeightedOrder, shares
from bgen.store.store import Store
from bgen.store.weighting import weighted_order


def make(sizes: list[int], batch: int, lanes: int, window: int, seed: int, temperature: float) -> WeightedOrder:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    sources = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    edges = np.unique(np.concatenate([[0, n], rng.integers(0, n + 1, n // 7)]))
    members = Members.of(np.arange(n), edges)
    return WeightedOrder(members, batch, lanes, window, seed, "x", sources=sources, temperature=temperature)


orders = st.builds(
    make,
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    batch=st.integers(1, 40),
    lanes=st.integers(1, 6),
    window=st.integers(1, 5),
    seed=st.integers(0, 9),
    temperature=st.sampled_from([1.0, 1.5, 3.0, 1e9]),
)


@settings(max_examples=25, deadline=None)
@given(orders)
def test_every_epoch_has_the_shares(order: WeightedOrder) -> None:
    n = len(order.members)
    line = np.concatenate([order.cells(step) for step in range(-(-3 * n // order.batch))])
    sizes = np.bincount(order.sources)
    assert order.draws.sum() == n
    assert np.all(np.abs(order.draws - n * shares(sizes, order.temperature)) < 1)
    for epoch in range(3):
        cells = line[epoch * n : (epoch + 1) * n]
        # a batch across the end of an epoch takes some of both, so the line is compared as a whole
        drawn = np.bincount(cells, minlength=n)
        if order.lanes == 1:
            assert np.bincount(order.sources[cells], minlength=len(sizes)).tolist() == order.draws.tolist()
            assert np.array_equal(drawn, order.multiplicities(epoch))
    expected = sum(order.multiplicities(epoch) for epoch in range(3))
    whole = [step for step in range(-(-3 * n // order.batch)) if (step + 1) * order.batch <= 3 * n]
    seen = np.bincount(line[: len(whole) * order.batch], minlength=n)
    assert np.all(seen <= expected)
    assert expected.sum() - seen.sum() < order.batch
    rate = order.draws / sizes
    for epoch in range(2):
        often = order.multiplicities(epoch)
        assert np.all(np.abs(often - rate[order.sources]) < 1)  # any two cells of a source equally often, but for one


@settings(max_examples=40, deadline=None)
@given(orders, st.integers(0, 200), st.sampled_from([1, 2, 3, 4, 8]))
def test_slices_make_up_the_batch_at_any_step(order: WeightedOrder, step: int, world: int) -> None:
    edges = np.arange(world + 1) * order.batch // world
    parts = [order.cells(step, int(a), int(b)) for a, b in pairwise(edges) if b > a]
    assert np.array_equal(np.concatenate(parts), order.cells(step))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=4), st.integers(1, 30), st.integers(0, 5))
def test_temperature_one_is_the_plain_order(sizes: list[int], batch: int, seed: int) -> None:
    weighted = make(sizes, batch, 3, 2, seed, 1.0)
    plain = Order(weighted.members, batch, 3, 2, seed, "x")
    for step in range(2 * sum(sizes) // batch + 2):
        assert np.array_equal(weighted.cells(step), plain.cells(step))


def test_shares() -> None:
    sizes = np.array([1000, 10, 0])
    assert shares(sizes, 1.0) == pytest.approx([1000 / 1010, 10 / 1010, 0])
    assert shares(sizes, 2.0) == pytest.approx([1000**0.5 / (1000**0.5 + 10**0.5), 10**0.5 / (1000**0.5 + 10**0.5), 0])
    assert shares(sizes, 1e9) == pytest.approx([0.5, 0.5, 0])


def test_epochs_and_seeds_differ() -> None:
    a, b = make([300, 20], 10, 2, 2, 0, 2.0), make([300, 20], 10, 2, 2, 1, 2.0)
    assert not np.array_equal(a.multiplicities(0), a.multiplicities(1))
    assert not np.array_equal(a.cells(0), b.cells(0))


def test_a_store_trains_with_it(store: Store) -> None:
    options = {"batch": 96, "lanes": 4, "window": 2, "seed": 5}
    order = weighted_order(store, "train", temperature=1e6, by="a/b c", **options)
    values = store.column("a/b c")[1]
    loader = TrainLoader(CountReader(store), order, seed=5)
    seen = np.concatenate([loader.read(step)[0].cells.numpy() for step in range(25)])  # two epochs of 1,200 draws
    assert np.array_equal(seen, np.concatenate([order.cells(step) for step in range(25)]))
    assert np.bincount(values[seen]).tolist() == [1200, 1200]
    assert np.isin(seen, store.cells_of_split("train")).all()
    plain = weighted_order(store, "train", temperature=3.0, **options)  # one file: nothing to weigh
    assert np.array_equal(plain.cells(17), store.order("train", **options).cells(17))
    with pytest.raises(UserError, match="'dose' holds numbers"):
        weighted_order(store, "train", temperature=2.0, by="dose", **options)
    with pytest.raises(UserError, match=r"at least 1, not 0\.5"):
        weighted_order(store, "train", temperature=0.5, **options)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 3))
def test_what_is_counted_again_is_what_was_counted(sizes: list[int], seed: int, epoch: int) -> None:
    """The numbers of the cells within their source, from few marks, are those of one count of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weighted, "MARKS", 0)
        order = make(sizes, 16, 2, 2, seed, 2.0)
    assert len(order._seen) < len(order.members.chunks) or len(order.members.chunks) == 1 or len(sizes) < 4
    number = np.zeros(len(order.sources), np.int64)
    for source in range(len(sizes)):
        there = order.sources == source
        number[there] = np.arange(there.sum())
    drawn, phase = order.draws[order.sources], order._phases(epoch)[order.sources]
    cells = np.array(sizes)[order.sources]
    expected = ((number + 1) * drawn + phase) // cells - (number * drawn + phase) // cells
    assert np.array_equal(order.multiplicities(epoch), expected)
    for chunk in range(len(order.members.chunks)):
        start, stop = order._starts[chunk], order._starts[chunk + 1]
        assert np.array_equal(order.multiplicities(epoch, start, stop), expected[start:stop])


def test_codes_are_held_as_they_are() -> None:
    """Codes of sources, -1 among them, and a table of their numbers: the draws are those of the numbers themselves."""
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([-1, 2, 5], np.int8), 900)
    members = Members.of(range(900), np.arange(0, 901, 30))
    table = np.array([9, 9, 1, 9, 9, 2, 0])
    options: dict[str, Any] = {"temperature": 3.0}
    one = WeightedOrder(members, 32, 2, 3, 0, "x", sources=codes, source_of=table, **options)
    other = WeightedOrder(members, 32, 2, 3, 0, "x", sources=table[codes], **options)
    assert one.sources is codes
    for step in (0, 40):
        assert np.array_equal(one.cells(step), other.cells(step))
