from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bgen.order.cells import Members, Order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any))
    first = np.concatenate([[0], np.cumsum(sizes)])
    chosen = draw(st.sampled_from(["all", "some", "tail"]))
    cells = np.arange(first[-1])
    if chosen == "some":
        keep = np.random.default_rng(draw(st.integers(0, 99))).random(len(cells)) < 0.6
        keep[draw(st.integers(0, len(cells) - 1))] = True
        cells = cells[keep]
    elif chosen == "tail":
        cells = cells[draw(st.integers(0, len(cells) - 1)) :]
    return Order(
        Members.of(cells, first),
        batch=draw(st.integers(1, 40)),
        lanes=draw(st.integers(1, 9)),
        window=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 3)),
        name="store/train",
    )


FROZEN = [1245, 24104, 8356, 6806, 9514, 8234]


def cells_of(order: Order) -> np.ndarray:
    n = len(order.members)
    return order.members.take(np.arange(n))


@settings(deadline=None, max_examples=150)
@given(orders(), st.integers(0, 3))
def test_every_epoch_holds_every_cell_once(order: Order, epoch: int) -> None:
    n, b = len(order.members), order.batch
    first, last = epoch * n // b, -(-(epoch + 1) * n // b)
    line = np.concatenate([order.cells(step) for step in range(first, last)])
    line = line[epoch * n - first * b :][:n]
    assert Counter(line.tolist()) == Counter(cells_of(order).tolist())


@settings(deadline=None, max_examples=100)
@given(orders(), st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 8]))
def test_the_batch_does_not_depend_on_ranks_or_history(order: Order, step: int, ranks: int) -> None:
    whole = order.cells(step)
    assert len(whole) == order.batch
    edges = [order.batch * rank // ranks for rank in range(ranks + 1)]
    fresh = Order(order.members, order.batch, order.lanes, order.window, order._key[0], "store/train")
    parts = [fresh.cells(step, a, b) for a, b in itertools.pairwise(edges) if b > a]
    assert np.array_equal(np.concatenate(parts), whole)


@settings(deadline=None, max_examples=100)
@given(orders(), st.integers(0, 6))
def test_windows_hold_the_chunks_of_their_cells_and_follow_each_other(order: Order, step: int) -> None:
    member_chunk = np.repeat(order.members.chunks, np.diff(np.concatenate([[0], order.members.ends])))
    chunk_of = dict(zip(cells_of(order).tolist(), member_chunk.tolist(), strict=True))
    for run in order.runs(step):
        window = order.read_window(run.window)
        assert set(window.chunks.tolist()) == {chunk_of[cell] for cell in window.cells.tolist()}
        assert len(np.unique(window.chunks)) == len(window.chunks) <= order.window
        following = order.next_window(run.window)
        assert following > run.window
        assert following[1] == run.window[1]
        assert len(order.read_window(following).cells) > 0


def build(seed: int = 0, name: str = "store/train", lanes: int = 8, n_chunks: int = 1600) -> Order:
    first = np.arange(n_chunks + 1) * 16
    return Order(Members.of(np.arange(first[-1]), first), batch=256, lanes=lanes, window=16, seed=seed, name=name)


def test_epochs_seeds_and_names_differ() -> None:
    order = build()
    steps = len(order.members) // order.batch
    assert steps * order.batch == len(order.members)
    first = np.concatenate([order.cells(step) for step in range(steps)])
    second = np.concatenate([order.cells(step) for step in range(steps, 2 * steps)])
    assert np.mean(first == second) < 0.01
    assert np.mean(first == np.concatenate([build(seed=1).cells(s) for s in range(steps)])) < 0.01
    assert np.mean(first == np.concatenate([build(name="store/valid").cells(s) for s in range(steps)])) < 0.01


def test_the_order_is_frozen() -> None:
    # Written down once: a change of these numbers breaks every resumed run and needs a new order version.
    assert build().cells(3)[:6].tolist() == FROZEN


def test_ranks_read_only_the_chunks_of_their_lanes() -> None:
    order = build()
    steps = range(3 * len(order.members) // order.batch + 7)
    windows = [
        {run.window for step in steps for run in order.runs(step, rank * 32, (rank + 1) * 32)} for rank in range(8)
    ]
    chunks = [sum(len(order.read_window(key).chunks) for key in keys) for keys in windows]
    alone = {run.window for step in steps for run in order.runs(step)}
    assert sum(chunks) <= 1.1 * sum(len(order.read_window(key).chunks) for key in alone)
    assert not windows[0] & windows[5]


def test_shuffling_mixes_the_whole_store() -> None:
    order = build()
    batch = np.sort(order.cells(11) // 16)  # chunks
    assert len(np.unique(batch)) > 80  # of 128 in the lanes' windows
    assert batch.max() - batch.min() > 1500


def test_no_cells_is_an_error() -> None:
    with pytest.raises(ValueError, match="no cells"):
        Order(Members.of(np.array([], np.int64), np.array([0, 4])), 1, 1, 1, 0, "store/none")
