"""Products of small float32 matrices inside numba loops, on a CPU.

A matrix library costs a call, copies what is not contiguous, and computes both triangles of a triangular matrix. Here a
tile of rows by lanes stays in registers, as LLVM vectors of whatever width the CPU has. Measured on one core (AVX-512),
64 by 64 by 64: 105 to 109 GFLOP/s, also of a transposed ``a``; torch's batched product: 86.

Axes: M rows, K summed over, N columns.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

from bgen.arrays import F32

LANES = 16
"""N has to be a multiple of it."""

ROWS, VECTORS = (8, 2) if get_host_cpu_features().get("avx512f", False) else (4, 1)
"""A tile's rows and vectors of LANES, as many as the CPU has registers for."""

FULL, LOWER, UPPER, BELOW = range(4)
"""What of a product is computed: all; all of a lower or an upper triangular ``a``, whose other part is 0 (between the
diagonal and the next multiple of ROWS it is read, beyond it is not); only the part of ``out`` up to the diagonal, and
whole vectors of LANES."""


def _tile(rows: int, vectors: int) -> Any:
    """Make ``out[r, :] = keep * source[r, :] + by[r] * (sum over k < n of a[r, k] * b[k, :])``, in whole vectors.

    All by address; ``n`` is at least 1; where ``keep`` is 0 the source is not used, and an address ``by`` of 0 stands
    for factors of 1.
    """

    @intrinsic
    def tile(
        typing: Any,
        a: Any,
        a_row: Any,
        a_column: Any,
        b: Any,
        b_row: Any,
        out: Any,
        out_row: Any,
        source: Any,
        source_row: Any,
        n: Any,
        by: Any,
        keep: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number, index = ir.FloatType(), ir.IntType(64)
            vector = ir.VectorType(number, LANES)
            zero, everywhere = ir.Constant(vector, None), ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
            a, a_row, a_column, b, b_row, out, out_row, source, source_row, n, by, keep = arguments
            multiply_add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32"
            )
            a_at, b_at, out_at, source_at, by_at = (
                builder.inttoptr(t, number.as_pointer()) for t in (a, b, out, source, by)
            )

            def vectors_at(base: Any, offset: Any) -> list[Any]:
                places = [builder.add(offset, index(LANES * v)) for v in range(vectors)]
                return [builder.bitcast(builder.gep(base, [place]), vector.as_pointer()) for place in places]

            def load(pointer: Any) -> Any:
                loaded = builder.load(pointer)
                loaded.align = 4
                return loaded

            def spread(value: Any) -> Any:
                first = builder.insert_element(vector(ir.Undefined), value, ir.IntType(32)(0))
                return builder.shuffle_vector(first, vector(ir.Undefined), everywhere)

            of_row = [builder.mul(a_row, index(r)) for r in range(rows)]
            entry, loop, done = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            k, sums = builder.phi(index), [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
            k.add_incoming(index(0), entry)
            values = [load(pointer) for pointer in vectors_at(b_at, builder.mul(k, b_row))]
            column, after = builder.mul(k, a_column), []
            for r in range(rows):
                factor = spread(builder.load(builder.gep(a_at, [builder.add(column, of_row[r])])))
                after.append(
                    [builder.call(multiply_add, [factor, *pair]) for pair in zip(values, sums[r], strict=True)]
                )
                for before, found in zip(sums[r], after[r], strict=True):
                    before.add_incoming(zero, entry)
                    before.add_incoming(found, loop)
            following = builder.add(k, index(1))
            k.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, n), loop, done)
            builder.position_at_end(done)

            one = cgutils.global_constant(builder, "one", number(1.0))
            plain, fresh = builder.icmp_signed("==", by, index(0)), builder.fcmp_ordered("==", keep, number(0.0))
            factors, kept = builder.select(plain, one, by_at), spread(keep)
            for r in range(rows):
                factor = spread(builder.load(builder.gep(factors, [builder.select(plain, index(0), index(r))])))
                sources = vectors_at(source_at, builder.mul(source_row, index(r)))
                places = vectors_at(out_at, builder.mul(out_row, index(r)))
                for found, given, place in zip(after[r], sources, places, strict=True):
                    before = builder.select(fresh, zero, builder.fmul(kept, load(given)))
                    builder.store(builder.call(multiply_add, [factor, found, before]), place).align = 4
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11, types.float32), generate

    return tile


def _turn() -> Any:
    """Make what writes the transpose of ``t [LANES, LANES]``; all by address."""

    @intrinsic
    def transpose_tile(typing: Any, t: Any, t_row: Any, out: Any, out_row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number, index = ir.FloatType(), ir.IntType(64)
            vector = ir.VectorType(number, LANES)
            t, t_row, out, out_row = arguments

            def places(base: Any, row: Any) -> list[Any]:
                start = builder.inttoptr(base, number.as_pointer())
                found = [builder.gep(start, [builder.mul(row, index(r))]) for r in range(LANES)]
                return [builder.bitcast(pointer, vector.as_pointer()) for pointer in found]

            rows = []
            for pointer in places(t, t_row):
                rows.append(builder.load(pointer))
                rows[-1].align = 4
            # Riffling the lower half of the rows into the upper turns the bits of (row, column) by one place; after as
            # many times as a row has bits, rows are columns.
            half, lanes = LANES // 2, ir.VectorType(ir.IntType(32), LANES)
            low = lanes([lane // 2 + LANES * (lane % 2) for lane in range(LANES)])
            high = lanes([half + lane // 2 + LANES * (lane % 2) for lane in range(LANES)])
            for _ in range(LANES.bit_length() - 1):
                rows = [
                    builder.shuffle_vector(rows[r], rows[r + half], order) for r in range(half) for order in (low, high)
                ]
            for row, pointer in zip(rows, places(out, out_row), strict=True):
                builder.store(row, pointer).align = 4
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), generate

    return transpose_tile


_block, _column, _row = _tile(ROWS, VECTORS), _tile(ROWS, 1), _tile(1, 1)
_transpose_tile = _turn()


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _product(
    a: Any,
    a_row: int,
    a_column: int,
    b: Any,
    b_row: int,
    out: Any,
    out_row: int,
    source: Any,
    source_row: int,
    M: int,
    K: int,
    N: int,
    part: int,
    by: Any,
    keep: Any,
) -> None:
    i = 0
    while i < M:
        rows = ROWS if i + ROWS <= M else 1
        begin = i if part == UPPER else 0
        n = (min(i + rows, K) if part == LOWER else K) - begin
        columns = min(i + rows, N) if part == BELOW else N
        a_at, b_at, by_at = a + 4 * (i * a_row + begin * a_column), b + 4 * begin * b_row, by + 4 * i if by else by
        j = 0
        while j < columns:
            b_here, to, of = b_at + 4 * j, out + 4 * (i * out_row + j), source + 4 * (i * source_row + j)
            if rows == 1:
                _row(a_at, a_row, a_column, b_here, b_row, to, out_row, of, source_row, n, by_at, keep)
                j += LANES
            elif columns - j > (VECTORS - 1) * LANES:
                _block(a_at, a_row, a_column, b_here, b_row, to, out_row, of, source_row, n, by_at, keep)
                j += VECTORS * LANES
            else:
                _column(a_at, a_row, a_column, b_here, b_row, to, out_row, of, source_row, n, by_at, keep)
                j += LANES
        i += rows


@numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def add_product(out: F32, a: F32, b: F32, part: int) -> None:
    """Add ``a @ b`` to ``out``, for use in compiled loops: nothing is checked.

    Parameters
    ----------
    out
        ``[M, N]``, N a multiple of LANES; its rows are contiguous.
    a
        ``[M, K]``, of any strides; K is not 0.
    b
        ``[K, N]``; its rows are contiguous.
    part
        FULL, LOWER, UPPER or BELOW.
    """
    _call(out, a, b, part, np.intp(0), out, np.float32(1))


@numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def put_product(out: F32, a: F32, b: F32, part: int) -> None:
    """Write ``a @ b`` to ``out``; otherwise as :func:`add_product`."""
    _call(out, a, b, part, np.intp(0), out, np.float32(0))


@numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def mix_product(out: F32, keep: Any, source: F32, by: F32, a: F32, b: F32) -> None:
    """Write ``keep * source + diag(by) @ a @ b`` to ``out``; otherwise as :func:`add_product`.

    ``source [M, N]`` has contiguous rows and may be ``out``, ``by [M]`` is contiguous.
    """
    _call(out, a, b, FULL, np.intp(by.ctypes.data), source, keep)


@numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
def _call(out: F32, a: F32, b: F32, part: int, by: Any, source: F32, keep: Any) -> None:
    _product(
        np.intp(a.ctypes.data),
        a.strides[0] // 4,
        a.strides[1] // 4,
        np.intp(b.ctypes.data),
        b.strides[0] // 4,
        np.intp(out.ctypes.data),
        out.strides[0] // 4,
        np.intp(source.ctypes.data),
        source.strides[0] // 4,
        a.shape[0],
        a.shape[1],
        b.shape[1],
        part,
        by,
        keep,
    )


@numba.njit(cache=True, nogil=True, error_model="numpy")
def transpose(out: F32, t: F32) -> None:
    """Write the transpose of ``t [M, N]`` into ``out [N, M]``, both contiguous, M and N multiples of LANES."""
    M, N = t.shape
    t_at, out_at = np.intp(t.ctypes.data), np.intp(out.ctypes.data)
    for i in range(0, M, LANES):
        for j in range(0, N, LANES):
            _transpose_tile(t_at + 4 * (i * N + j), N, out_at + 4 * (j * M + i), M)
