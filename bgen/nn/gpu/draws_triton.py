"""Triton kernel of keyed draws: two numbers of each 64 random bits, which are in registers only."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bgen.nn.gpu.bits_triton import at, row_state

PAIRS = 512
"""Pairs of numbers that a program draws."""


@triton.jit
def _unit(bits):
    """Numbers of 23 bits to float32 in (0, 1)."""
    return (bits.to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit(do_not_specialize=["stream"])
def _draw(keys, out, stream, width, pairs, total, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, pair = place // pairs, place % pairs
    inside = place < total
    bits = at(row_state(tl.load(keys + row, inside, 0), stream), pair)
    first, second = _unit(bits >> 41), _unit((bits >> 9) & 0x7FFFFF)
    if NORMAL:
        radius, angle = tl.sqrt(-2.0 * tl.log(first)), second * 6.283185307179586
        first, second = radius * tl.cos(angle), radius * tl.sin(angle)
    tl.store(out + row * width + 2 * pair, first, inside)
    tl.store(out + row * width + 2 * pair + 1, second, inside & (2 * pair + 1 < width))


def draw(keys: Tensor, out: Tensor, stream: int, normal: bool) -> None:
    """Write numbers into ``out``, float32 ``[B, n]``, contiguous: normal, or uniform in (0, 1).

    ``keys`` are int64 ``[B]``, ``stream`` is the number that the stream adds to their sequence.
    """
    pairs = triton.cdiv(out.shape[1], 2)
    total = len(out) * pairs
    if total:
        _draw[(triton.cdiv(total, PAIRS),)](keys, out, stream, out.shape[1], pairs, total, NORMAL=normal, BLOCK=PAIRS)
