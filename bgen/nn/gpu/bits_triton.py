"""Within Triton kernels: the random bits of :mod:`bgen.nn.random`, the same to the last.

Operations are those of uint64, which wrap.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(bits):
    """SplitMix64's finaliser, of uint64."""
    bits = (bits ^ (bits >> 30)) * MIX_1
    bits = (bits ^ (bits >> 27)) * MIX_2
    return bits ^ (bits >> 31)


@triton.jit
def row_state(key, stream):
    """Where the sequence of a key starts in a stream, whose number comes multiplied (:func:`offset`)."""
    return mix(mix(key.to(tl.uint64)) + stream.to(tl.uint64))


@triton.jit
def at(state, position):
    """Random bits at positions of a sequence, uint64."""
    return mix(state + (position.to(tl.uint64) + 1) * GOLDEN)
