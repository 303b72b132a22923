"""Small products and transposes in compiled loops, against numpy's in float64."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from bgen.nn.cpu.matmul import (
    BELOW,
    FULL,
    LANES,
    LOWER,
    ROWS,
    UPPER,
    add_product,
    mix_product,
    put_product,
    transpose,
)

Matrix = NDArray[np.float32]


@numba.njit
def _add(out: Matrix, a: Matrix, b: Matrix, part: int) -> None:
    add_product(out, a, b, part)


@numba.njit
def _put(out: Matrix, a: Matrix, b: Matrix, part: int) -> None:
    put_product(out, a, b, part)


@numba.njit
def _mix(out: Matrix, keep: float, source: Matrix, by: Matrix, a: Matrix, b: Matrix) -> None:
    mix_product(out, np.float32(keep), source, by, a, b)


def draw(*shape: int) -> Matrix:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("M", [1, 3, 4, 21, 64])
@pytest.mark.parametrize("K", [1, 17, 64])
@pytest.mark.parametrize("turned", [False, True])
def test_product_is_added_whatever_the_strides(M: int, K: int, turned: bool) -> None:
    a = draw(K, 2 * M)[:, ::2].T if turned else draw(M, K)
    b, out = draw(K, 100)[:, 3:51], draw(M, 70)
    expected = out.astype(np.float64)
    expected[:, 5:53] += a.astype(np.float64) @ b
    _add(out[:, 5:53], a, b, FULL)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * K)


@pytest.mark.parametrize("M", [1, 4, 7, 37, 64])
def test_triangles(M: int) -> None:
    a, b = draw(M, M), draw(M, LANES)
    for part, triangle in ((LOWER, np.tril(a)), (UPPER, np.triu(a))):
        out = np.zeros((M, LANES), np.float32)
        _add(out, triangle, b, part)
        np.testing.assert_allclose(out, triangle.astype(np.float64) @ b, rtol=0, atol=1e-4)


def test_the_other_part_of_a_triangle_is_not_read_beyond_a_tile() -> None:
    a, b = draw(64, 64), draw(64, LANES)
    i = np.arange(64)
    beyond = i[None] // ROWS > i[:, None] // ROWS
    for part, given, barred in ((LOWER, np.tril(a), beyond), (UPPER, np.triu(a), beyond.T)):
        out, poisoned = np.zeros((64, LANES), np.float32), np.where(barred, np.float32(np.nan), given)
        _add(out, poisoned, b, part)
        np.testing.assert_allclose(out, given.astype(np.float64) @ b, rtol=0, atol=1e-4)


def test_only_the_part_up_to_the_diagonal_is_written() -> None:
    a, b, out = draw(48, 20), draw(20, 48), np.zeros((48, 48), np.float32)
    _add(out, a, b, BELOW)
    i = np.arange(48)
    wanted = i[None] // LANES * LANES < (i[:, None] // ROWS + 1) * ROWS
    np.testing.assert_allclose(out, np.where(wanted, a.astype(np.float64) @ b, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", [FULL, LOWER, UPPER])
def test_what_stood_there_before_does_not_matter_to_a_product_that_is_put(part: int) -> None:
    a, b = draw(21, 21), draw(21, 48)
    a = {FULL: a, LOWER: np.tril(a), UPPER: np.triu(a)}[part]
    out = np.full((21, 48), np.nan, np.float32)
    _put(out, a, b, part)
    np.testing.assert_allclose(out, a.astype(np.float64) @ b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("M", [1, 21, 64])
@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_product_is_mixed_with_a_source(M: int, keep: float) -> None:
    a, b, by, source = draw(M, 17), draw(17, 48), draw(M, 1)[:, 0].copy(), draw(M, 50)[:, 1:49]
    expected = keep * source.astype(np.float64) + by[:, None].astype(np.float64) * (a.astype(np.float64) @ b)
    out = np.full((M, 60), np.nan, np.float32)
    _mix(out[:, 5:53], keep, source, by, a, b)
    np.testing.assert_allclose(out[:, 5:53], expected, rtol=0, atol=1e-4)
    assert np.isnan(out[:, :5]).all()
    assert np.isnan(out[:, 53:]).all()
    _mix(source, keep, source, by, a, b)
    np.testing.assert_array_equal(source, out[:, 5:53])


@pytest.mark.parametrize("shape", [(16, 16), (32, 64), (80, 16)])
def test_transpose(shape: tuple[int, int]) -> None:
    t, out = draw(*shape), np.empty(shape[::-1], np.float32)
    transpose(out, t)
    np.testing.assert_array_equal(out, t.T)
