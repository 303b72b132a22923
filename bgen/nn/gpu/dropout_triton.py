"""Triton kernels of keyed dropout: masks are computed where they are used, from a key and a place, and never stored.

Four places share 64 random bits, which a program computes once for the four. For each place it does some 10 integer
operations of 32 bits and one product.

Axes: B keys, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bgen.nn.gpu.bits_triton import at, row_state

FOURS = 256
"""Groups of four places that a program holds at once."""


@triton.jit
def _kept(keys, row, fours, stream, threshold):
    """Whether places are kept: four for each number in ``fours``."""
    bits = at(row_state(tl.load(keys + row), stream), fours)
    quarter = bits[:, None] >> (tl.arange(0, 4) * 16).to(tl.uint64)[None, :]
    return quarter.to(tl.int16).to(tl.int32) < threshold


@triton.jit(do_not_specialize=["stream", "threshold"])
def _mask(keys, out, stream, threshold, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    fours = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = fours[:, None] * 4 + tl.arange(0, 4)[None, :]
    kept = _kept(keys, row, fours, stream, threshold)
    tl.store(out + row * width + place, kept.to(tl.int8), place < width)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _dropout(x, keys, out, stream, threshold, scale, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    fours = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = fours[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = place < width
    factor = tl.where(_kept(keys, row, fours, stream, threshold), scale, 0.0)
    value = tl.load(x + row * width + place, inside, 0.0).to(tl.float32) * factor
    tl.store(out + row * width + place, value.to(out.dtype.element_ty), inside)


def mask(keys: Tensor, out: Tensor, stream: int, threshold: int) -> None:
    """Write into ``out``, int8 ``[B, D]``, which places are kept: those whose 16 bits are below a threshold.

    ``keys`` are int64 ``[B]``, ``stream`` is the number that the stream adds to their sequence.
    """
    grid = len(out), triton.cdiv(out.shape[1], 4 * FOURS)
    _mask[grid](keys, out, stream, threshold, out.shape[1], BLOCK=FOURS)


def dropout(x: Tensor, keys: Tensor, out: Tensor, stream: int, threshold: int, scale: float) -> None:
    """Write into ``out [B, D]`` the places of ``x [B, D]`` that are kept, times ``scale``, and the others times 0.

    Both are contiguous, and float32, bfloat16 or float16.
    """
    grid = len(x), triton.cdiv(x.shape[1], 4 * FOURS)
    _dropout[grid](x, keys, out, stream, threshold, scale, x.shape[1], BLOCK=FOURS)
