from __future__ import annotations

import numpy as np
import torch

from bgen.data.buffers import IDLE, Pool
from bgen.store.arena import Arena


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_only_when_nobody_refers_to_it() -> None:
    pool = Pool()
    first = pool.take((4, 25_000), np.float32)
    assert (first.shape, first.dtype) == ((4, 25_000), np.float32)
    where = address(first)
    tensor = torch.from_numpy(first)[1]  # a view of a tensor of a view
    del first
    other = pool.take((4, 25_000), np.float32)
    assert address(other) != where
    del tensor
    assert address(pool.take((100_000,), np.int32)) == where


def test_slack_lets_batches_differ_in_size() -> None:
    pool = Pool(slack=0.125)
    where = address(pool.take((1_000_000,), np.uint8))
    assert address(pool.take((1_120_000,), np.uint8)) == where
    assert address(pool.take((900_000,), np.uint8)) == where
    assert pool.n_bytes == 1_125_000


def test_idle_memory_goes_back() -> None:
    pool = Pool()
    parts = [pool.take((1_000_000,), np.uint8) for _ in range(5)]
    del parts
    assert pool.n_bytes == 5_000_000
    for _ in range(IDLE + 2):
        pool.take((10_000_000,), np.uint8)
    assert pool.n_bytes == 10_000_000


def test_an_arena_takes_the_lowest_free_slots() -> None:
    arena = Arena(6, 10, 12)
    assert (arena.gaps.shape, arena.counts.shape) == ((6, 10), (6, 12))
    first, second = arena.take(2), arena.take(3)
    assert first is not None
    assert second is not None
    assert [first.tolist(), second.tolist()] == [[0, 1], [2, 3, 4]]
    assert arena.take(2) is None
    arena.give(first)
    third = arena.take(3)
    assert third is not None
    assert third.tolist() == [0, 1, 5]
