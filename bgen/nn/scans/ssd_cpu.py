"""The chunked SSD and its gradient on a CPU in float32, compiled: chunk by chunk and head by head, in its caches.

There is one sweep over the chunks of a sequence forward and one backward, because memory is the bottleneck: the state
stays in the caches, every input is read once, and the weights within a chunk exist for one head at a time, up to the
diagonal.

Axes: B sequences, C chunks, Q points of a chunk, H heads, K groups of heads that share b and c, P channels, S state
size; P and S are multiples of LANES.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from bgen.arrays import F32, I64
from bgen.nn.cpu.elementary import exp_not_above_one
from bgen.nn.cpu.matmul import BELOW, FULL, LANES, LOWER, UPPER, add_product, mix_product, put_product, transpose
from bgen.nn.cpu.threads import parts
from bgen.nn.scans.ssd_torch import Edges

F = np.float32


def _compile(parallel: bool = False) -> Any:
    return numba.njit(cache=True, nogil=True, error_model="numpy", parallel=parallel)


def _inlined(*flags: str) -> Any:
    """Compile arithmetic into its callers (:mod:`bgen.nn.cpu.elementary` says why)."""
    return numba.njit(
        cache=True, nogil=True, forceinline=True, error_model="numpy", fastmath={"contract", "nsz", *flags}
    )


@_compile(parallel=True)
def _forward(
    x: F32,
    total: F32,
    b: F32,
    c: F32,
    first: I64,
    carried: bool,
    to_end: F32,
    from_start: F32,
    through: F32,
    split: int,
    parts: int,
    states: F32,
    y: F32,
) -> None:
    """Write ``y [B, C, Q, H, P]`` and, from the first of them, the ``states [B, 1 + C, H, S, P]``.

    The heads of a sequence and group are cut into ``split`` pieces, which the threads take in ``parts``.
    """
    units = x.shape[0] * b.shape[3] * split
    for part in numba.prange(parts):
        for unit in range(units * part // parts, units * (part + 1) // parts):
            _forward_unit(x, total, b, c, first, carried, to_end, from_start, through, split, unit, states, y)


@_compile()
def _forward_unit(
    x: F32,
    total: F32,
    b: F32,
    c: F32,
    first: I64,
    carried: bool,
    to_end: F32,
    from_start: F32,
    through: F32,
    split: int,
    unit: int,
    states: F32,
    y: F32,
) -> None:
    _, C, Q, H, P = x.shape
    K, S = b.shape[3:]
    n, k, begin, end = _heads(unit, split, H, K)
    wide = -(-Q // LANES) * LANES
    b_here, c_here, scaled, b_turned = _room(wide, S), _room(wide, S), _room(wide, S), _room(S, wide)
    x_own, y_here = np.zeros((end - begin, wide, P), F), _room(wide, P)
    cb, weight, totals, ones = _room(wide, wide), _room(wide, wide), _row(wide), np.ones(S, F)
    for chunk in range(C):
        _take_maps(b[n, chunk, :, k], c[n, chunk, :, k], b_here, c_here, b_turned, cb)
        firsts = first[n % len(first), chunk % first.shape[1]]
        _gather(x[n, chunk, :, begin:end], x_own)
        for h in range(begin, end):
            x_here, to = x_own[h - begin, :Q], y[n, chunk, :, h]
            _weights(cb, total[n, chunk, h], firsts, totals, weight)
            if carried:
                entering, leaving, by = states[n, chunk, h], states[n, chunk + 1, h], through[n, chunk, h]
                put_product(y_here[:Q], weight[:Q, :Q], x_here, LOWER)
                mix_product(to, F(1), y_here[:Q], from_start[n, chunk, h], c_here[:Q], entering)
                _scale(b_here, to_end[n, chunk, h], scaled)
                mix_product(leaving, by, entering, ones, scaled[:Q].T, x_here)
            else:
                put_product(to, weight[:Q, :Q], x_here, LOWER)


@_compile(parallel=True)
def _backward(
    x: F32,
    total: F32,
    b: F32,
    c: F32,
    first: I64,
    dy: F32,
    carried: bool,
    to_end: F32,
    from_start: F32,
    through: F32,
    states: F32,
    split: int,
    parts: int,
    dstate: F32,
    dx: F32,
    dtotal: F32,
    db: F32,
    dc: F32,
) -> None:
    """Write the gradients; ``dstate [B, H, S, P]`` comes in for the last state and goes out for the first.

    ``db`` and ``dc [split, B, C, Q, K, S]`` hold the sums over the heads of each part.
    """
    units = x.shape[0] * b.shape[3] * split
    for part in numba.prange(parts):
        for unit in range(units * part // parts, units * (part + 1) // parts):
            _backward_unit(
                x,
                total,
                b,
                c,
                first,
                dy,
                carried,
                to_end,
                from_start,
                through,
                states,
                split,
                unit,
                dstate,
                dx,
                dtotal,
                db[unit % split],
                dc[unit % split],
            )


@_compile()
def _backward_unit(
    x: F32,
    total: F32,
    b: F32,
    c: F32,
    first: I64,
    dy: F32,
    carried: bool,
    to_end: F32,
    from_start: F32,
    through: F32,
    states: F32,
    split: int,
    unit: int,
    dstate: F32,
    dx: F32,
    dtotal: F32,
    db: F32,
    dc: F32,
) -> None:
    _, C, Q, H, P = x.shape
    K, S = b.shape[3:]
    n, k, begin, end = _heads(unit, split, H, K)
    wide = -(-Q // LANES) * LANES
    b_here, c_here, scaled, b_turned = _room(wide, S), _room(wide, S), _room(wide, S), _room(S, wide)
    db_here, dc_here = _room(wide, S), _room(wide, S)
    x_turned, dx_here, turned = _room(P, wide), _room(wide, P), _room(P, S)
    x_own, dy_own = np.zeros((end - begin, wide, P), F), np.zeros((end - begin, wide, P), F)
    cb, weight, dcb, dweight = _room(wide, wide), _room(wide, wide), _room(wide, wide), _room(wide, wide)
    totals, ones = _row(wide), np.ones(S, F)
    for chunk in range(C - 1, -1, -1):
        _take_maps(b[n, chunk, :, k], c[n, chunk, :, k], b_here, c_here, b_turned, cb)
        for sum_of_heads in (dcb, db_here, dc_here):
            _clear(sum_of_heads)
        firsts = first[n % len(first), chunk % first.shape[1]]
        _gather(x[n, chunk, :, begin:end], x_own)
        _gather(dy[n, chunk, :, begin:end], dy_own)
        for h in range(begin, end):
            x_here, dy_here, to, dtotal_here = (
                x_own[h - begin],
                dy_own[h - begin, :Q],
                dx[n, chunk, :, h],
                dtotal[n, chunk, h],
            )
            transpose(x_turned, x_here)
            put_product(dweight[:Q], dy_here, x_turned, BELOW)
            _weights_and_sum(cb, total[n, chunk, h], firsts, totals, dweight, weight, dcb)
            _add_row_sums_less_column_sums(dweight, dtotal_here)
            if carried:
                kept, since, by = to_end[n, chunk, h], from_start[n, chunk, h], through[n, chunk, h]
                entering, leaving, dleaving = states[n, chunk, h], states[n, chunk + 1, h], dstate[n, h]
                put_product(dx_here[:Q], weight[:Q, :Q].T, dy_here, UPPER)
                mix_product(to, F(1), dx_here[:Q], kept, b_here[:Q], dleaving)
                transpose(turned, dleaving)
                put_product(scaled[:Q], x_here[:Q], turned, FULL)
                _add_by_point(scaled, kept, b_here, db_here, F(-1), dtotal_here)
                transpose(turned, entering)
                put_product(scaled[:Q], dy_here, turned, FULL)
                _add_by_point(scaled, since, c_here, dc_here, F(1), dtotal_here)
                dtotal_here[Q - 1] += _dot(dleaving, leaving)
                _scale(c_here, since, scaled)
                mix_product(dleaving, by, dleaving, ones, scaled[:Q].T, dy_here)
            else:
                put_product(to, weight[:Q, :Q].T, dy_here, UPPER)
        add_product(db_here[:Q], dcb[:Q, :Q].T, c_here[:Q], UPPER)
        add_product(dc_here[:Q], dcb[:Q, :Q], b_here[:Q], LOWER)
        _copy(db_here[:Q], db[n, chunk, :, k])
        _copy(dc_here[:Q], dc[n, chunk, :, k])


@_compile()
def _heads(unit: int, split: int, H: int, K: int) -> tuple[int, int, int, int]:
    """Return sequence, group, and the first head and that after the last."""
    group, part, R = unit // split, unit % split, H // K
    n, k = group // K, group % K
    return n, k, k * R + R * part // split, k * R + R * (part + 1) // split


@_compile()
def _take_maps(b: F32, c: F32, b_here: F32, c_here: F32, b_turned: F32, cb: F32) -> None:
    """Copy ``b`` and ``c [Q, S]`` of a chunk and group, and write ``cb_ij = c_i . b_j`` for j up to i."""
    Q = len(b)
    _copy(b, b_here)
    _copy(c, c_here)
    transpose(b_turned, b_here)
    put_product(cb[:Q], c_here[:Q], b_turned, BELOW)


@_compile()
def _room(rows: int, columns: int) -> F32:
    return np.zeros((rows, columns), F)


@_compile()
def _row(columns: int) -> F32:
    return np.zeros(columns, F)


@_inlined()
def _weights(cb: F32, total: F32, firsts: I64, totals: F32, out: F32) -> None:
    """Write ``cb_ij exp(total_i - total_j)``, up to the whole vector that holds the diagonal.

    ``totals`` is room for ``total``, as long as whole vectors are.
    """
    for i in range(len(total)):
        totals[i] = total[i]
    for i in range(len(firsts)):
        given, into, first = cb[i], out[i], firsts[i]
        for j in range((i // LANES + 1) * LANES):
            into[j] = given[j] * _decay(totals, i, j, first)


@_inlined()
def _weights_and_sum(cb: F32, total: F32, firsts: I64, totals: F32, dweight: F32, out: F32, dcb: F32) -> None:
    """Do as :func:`_weights`; add to the gradient of ``cb``, and multiply the gradient of the weights by them."""
    for i in range(len(total)):
        totals[i] = total[i]
    for i in range(len(firsts)):
        given, into, first, gradient, sums = cb[i], out[i], firsts[i], dweight[i], dcb[i]
        for j in range((i // LANES + 1) * LANES):
            by = _decay(totals, i, j, first)
            into[j] = given[j] * by
            sums[j] += gradient[j] * by
            gradient[j] *= into[j]


@_inlined("reassoc")
def _add_row_sums_less_column_sums(t: F32, out: F32) -> None:
    """Add to ``out [Q]`` the row sums of ``t`` less its column sums, both below the diagonal only."""
    for i in range(len(out)):
        row, total = t[i], F(0)
        for j in range(i):
            total += row[j]
            out[j] -= row[j]
        out[i] += total


@_inlined("reassoc")
def _add_by_point(t: F32, by: F32, given: F32, sums: F32, sign: float, out: F32) -> None:
    """Add ``diag(by) @ t`` to ``sums``, and ``sign`` times its product with ``given``, point by point, to ``out``."""
    for q in range(len(by)):
        total = F(0)
        for s in range(t.shape[1]):
            value = by[q] * t[q, s]
            sums[q, s] += value
            total += value * given[q, s]
        out[q] += sign * total


@_inlined()
def _decay(totals: F32, i: int, j: int, first: int) -> Any:
    """``exp(total_i - total_j)`` for j from first to i, 0 for others."""
    found = exp_not_above_one(min(totals[i] - totals[j], F(0)))
    return found if (j >= first) & (j <= i) else F(0)


@_inlined()
def _scale(t: F32, by: F32, out: F32) -> None:
    for q in range(len(by)):
        for e in range(t.shape[1]):
            out[q, e] = by[q] * t[q, e]


@_compile()
def _copy(t: F32, out: F32) -> None:
    """Copy ``t`` into the first rows of ``out``; numba's own assignment takes seconds to compile."""
    for q in range(len(t)):
        for e in range(t.shape[1]):
            out[q, e] = t[q, e]


@_compile()
def _clear(t: F32) -> None:
    for q in range(len(t)):
        for e in range(t.shape[1]):
            t[q, e] = 0


@_inlined("reassoc")
def _dot(t: F32, other: F32) -> Any:
    total = F(0)
    for s in range(len(t)):
        for p in range(t.shape[1]):
            total += t[s, p] * other[s, p]
    return total


@_compile()
def _gather(t: F32, out: F32) -> None:
    """Copy ``t [Q, R, P]`` into ``out [R, Q, P]``, in the order in which it lies in memory."""
    for q in range(len(t)):
        for r in range(t.shape[1]):
            given, into = t[q, r], out[r, q]
            for p in range(t.shape[2]):
                into[p] = given[p]


def forward(
    x_BCQHP: Tensor,
    total_BCHQ: Tensor,
    b_BCQKS: Tensor,
    c_BCQKS: Tensor,
    first_BCQ: Tensor | None,
    initial_BHSP: Tensor | None,
    edges: Edges | None,
) -> tuple[Tensor, Tensor | None]:
    """Return ``y_BCQHP`` and the states before the first chunk and after each, ``[B, 1 + C, H, S, P]``."""
    (B, C, _, H, P), S = x_BCQHP.shape, b_BCQKS.shape[4]
    states, y_BCQHP = None, torch.empty_like(x_BCQHP)
    if edges is not None:
        states = x_BCQHP.new_empty(B, 1 + C, H, S, P)
        states[:, 0] = 0 if initial_BHSP is None else initial_BHSP
    given = _arrays(x_BCQHP, total_BCHQ, b_BCQKS, c_BCQKS, _or_zero(first_BCQ, x_BCQHP.shape[2]))
    split, threads = _shares(x_BCQHP, b_BCQKS)
    _forward(*given, edges is not None, *_edges(edges), split, threads, *_arrays(_or_empty(states, 5), y_BCQHP))
    return y_BCQHP, states


def backward(
    x_BCQHP: Tensor,
    total_BCHQ: Tensor,
    b_BCQKS: Tensor,
    c_BCQKS: Tensor,
    first_BCQ: Tensor | None,
    edges: Edges | None,
    states: Tensor | None,
    dy_BCQHP: Tensor,
    dlast_BHSP: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``x``, ``total``, ``b``, ``c`` and the initial state."""
    split, threads = _shares(x_BCQHP, b_BCQKS)
    dx_BCQHP, dtotal_BCHQ = torch.empty_like(x_BCQHP), torch.zeros_like(total_BCHQ)
    db, dc = (b_BCQKS.new_empty(split, *b_BCQKS.shape) for _ in range(2))
    dstate_BHSP = None if dlast_BHSP is None else dlast_BHSP.clone(memory_format=torch.contiguous_format)
    _backward(
        *_arrays(x_BCQHP, total_BCHQ, b_BCQKS, c_BCQKS, _or_zero(first_BCQ, x_BCQHP.shape[2]), dy_BCQHP),
        edges is not None,
        *_edges(edges),
        *_arrays(_or_empty(states, 5)),
        split,
        threads,
        *_arrays(_or_empty(dstate_BHSP, 4), dx_BCQHP, dtotal_BCHQ, db, dc),
    )
    db_BCQKS, dc_BCQKS = (t[0] if split == 1 else t.sum(0) for t in (db, dc))
    return dx_BCQHP, dtotal_BCHQ, db_BCQKS, dc_BCQKS, dstate_BHSP


def _shares(x_BCQHP: Tensor, b_BCQKS: Tensor) -> tuple[int, int]:
    """Return into how many pieces to cut a group's heads, and how many threads have work."""
    (B, _, Q, H, _), K = x_BCQHP.shape, b_BCQKS.shape[3]
    threads = parts(B * H, x_BCQHP.numel() * Q)
    return min(H // K, -(-threads // (B * K))), threads


def _arrays(*tensors: Tensor) -> list[Any]:
    return [t.detach().numpy() for t in tensors]


def _or_zero(first_BCQ: Tensor | None, Q: int) -> Tensor:
    return torch.zeros(1, 1, Q, dtype=torch.int64) if first_BCQ is None else first_BCQ


def _or_empty(t: Tensor | None, axes: int) -> Tensor:
    """Return ``t``, or for None an array that nobody reads."""
    return torch.empty((0,) * axes) if t is None else t


def _edges(edges: Edges | None) -> list[Any]:
    return _arrays(*(_or_empty(None, axes) for axes in (4, 4, 3))) if edges is None else _arrays(*edges)
