"""Triton kernel of binomial thinning: the counts of a cell are read, thinned and written, and nothing else is stored.

Every operation is rounded as torch's are, one by one: no products are fused with sums, and what is not the same on all
devices (exponentials, quantiles, inverses) comes in tables that torch has made.

Axes: B cells, NNZ non-zero counts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bgen.nn.gpu.bits_triton import at, row_state

ENTRIES = 512
"""Counts that a program holds at once."""


@triton.jit(do_not_specialize=["stream"])
def _thin(
    indptr, indices, counts, keys, keep, lost, odds, none, inverses, quantiles, out, stream,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A cell: its counts less what is drawn."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    lane = tl.arange(0, BLOCK)
    thinned = tl.load(keep + row) < 1.0
    state = row_state(tl.load(keys + row), stream)
    p, ratio = tl.load(lost + row), tl.load(odds + row)
    for first in range(begin, end, BLOCK):
        place = first + lane
        inside = place < end
        n = tl.load(counts + place, inside, 0.0)
        if thinned:
            number = (at(state, tl.load(indices + place, inside, 0)) >> 41).to(tl.int32)
            u = (number.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
            small = n <= EXACT
            trials = tl.where(small, n, 0.0)
            chance = tl.load(none + row * (EXACT + 1) + trials.to(tl.int32))
            total = chance
            walks = u > total  # of no trials it is 1
            drawn = walks.to(tl.float32)
            longest = tl.max(tl.where(walks, trials, 0.0), 0).to(tl.int32)
            for k in range(longest - 1):
                chance = chance * ((trials - k) * tl.load(inverses + k) * ratio)
                total = total + chance
                drawn += ((u > total) & (trials > k + 1)).to(tl.float32)
            z = tl.load(quantiles + number, inside & (n > EXACT), 0.0)
            normal = tl.maximum(z * tl.sqrt_rn(n * p * (1.0 - p)) + n * p, 0.0)
            whole = tl.where(normal < 8388608.0, (normal + 8388608.0) - 8388608.0, normal)  # 2^23: to the nearest even
            n = n - tl.where(small, drawn, tl.minimum(whole, n))
        tl.store(out + place, n, inside)


def thin(
    indptr: Tensor,
    indices: Tensor,
    counts: Tensor,
    keys: Tensor,
    keep: Tensor,
    lost: Tensor,
    odds: Tensor,
    none: Tensor,
    inverses: Tensor,
    quantiles: Tensor,
    out: Tensor,
    stream: int,
) -> None:
    """Write into ``out [NNZ]`` the thinned counts.

    Parameters
    ----------
    indptr, indices, counts, keys
        The batch's.
    keep, lost, odds
        float32 ``[B]``: the share of its counts that a cell keeps (1: it is not thinned), the share that it loses, and
        lost / (1 - lost).
    none
        float32 ``[B, EXACT + 1]``: probability that of so many none is lost.
    inverses
        float32 ``[EXACT]``: 1, 1/2, 1/3 ...
    quantiles
        float32 ``[2^23]``: the normal quantiles of all numbers that are drawn.
    stream
        The number that the stream adds to the sequence of a key.
    """
    given = indptr, indices, counts, keys, keep, lost, odds, none, inverses, quantiles
    options = {"EXACT": none.shape[1] - 1, "BLOCK": ENTRIES, "enable_fp_fusion": False}
    _thin[(len(keep),)](*given, out, stream, **options)
