"""Random numbers that are a pure function of (key, stream, position): no generator, no state.

A model draws everything random for a cell (noise, dropout, thinning, flow time) from that cell's key, so the draw does
not depend on the number of ranks, on the micro batch, or on what other cells stand beside it. Only int64 operations
that wrap are used, so the bits are the same on a CPU and on a GPU.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014); position ``j`` of a row is its ``j``-th output.

Axes: B keys.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for. Two uses of the same key take different streams, which makes them independent."""

    POSTERIOR = 1
    THIN_CELL = 2
    THIN_COUNT = 3
    FLOW_NOISE = 4
    FLOW_TIME = 5
    CONDITION_DROPOUT = 6
    COUNTS = 7
    ZERO_INFLATION = 8
    FLOW_START = 9
    PATTERN = 10
    SHARED_TIME = 11
    FORGET = 12
    PANEL_CELL = 13
    PANEL_GENE = 14
    RESIDUAL = 15
    PARTNER = 16
    DROPOUT = 1 << 16  # a dropout layer adds its number


def _signed(value: int) -> int:
    """Write an integer, modulo 2^64, as the int64 with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_STREAM = 0xD1342543DE82EF95


def _shift(bits: Tensor, places: int) -> Tensor:
    """Logical right shift of int64 (torch's ``>>`` copies the sign)."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of int64 in which every output bit depends on every input bit."""
    bits = (bits ^ _shift(bits, 30)).mul_(_MIX_1)
    bits ^= _shift(bits, 27)
    bits *= _MIX_2
    bits ^= _shift(bits, 31)
    return bits


def stream_offset(stream: int) -> int:
    """What a stream adds to the sequences of all keys."""
    return _signed(stream * _STREAM)


def row_state(keys: Tensor, stream: int) -> Tensor:
    """int64 ``[B]``: where the sequence of each key starts in a stream."""
    return mix(mix(keys) + stream_offset(stream))


def at(state: Tensor, position: Tensor) -> Tensor:
    """Random bits at positions of sequences: int64 of the broadcast shape of ``state`` and ``position``."""
    return mix(state + (position + 1) * _GOLDEN)


def random_bits(keys: Tensor, stream: int, n: int) -> Tensor:
    """int64 ``[B, n]`` of random bits; the first columns do not depend on ``n``."""
    return at(row_state(keys, stream)[:, None], torch.arange(n, device=keys.device))


def unit_from_23_bits(bits: Tensor) -> Tensor:
    """Numbers of 23 bits to float32 in the open interval (0, 1): the middles of 2^23 equal cells."""
    return bits.to(torch.float32).add_(0.5).mul_(2.0**-23)


def unit_from_bits(bits: Tensor) -> Tensor:
    """float32 in (0, 1) from the upper 23 of 64 random bits."""
    return unit_from_23_bits(_shift(bits, 41))


def _unit_pair(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float32 in (0, 1) from the upper and the lower half of 64 random bits."""
    return unit_from_bits(bits), unit_from_23_bits((bits >> 9).bitwise_and_((1 << 23) - 1))


def uniform(keys: Tensor, stream: int, n: int) -> Tensor:
    """float32 ``[B, n]``, uniform in the open interval (0, 1), from int64 ``keys`` ``[B]``."""
    pair = torch.stack(_unit_pair(random_bits(keys, stream, (n + 1) // 2)), dim=-1)
    return pair.flatten(1)[:, :n]


def uniform64(keys: Tensor, stream: int, n: int) -> Tensor:
    """float64 ``[B, n]``, uniform in (0, 1) with 52 random bits: for inverting distributions far into the tail."""
    return _shift(random_bits(keys, stream, n), 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def normal(keys: Tensor, stream: int, n: int) -> Tensor:
    """float32 ``[B, n]``, standard normal, from int64 ``keys`` ``[B]`` (Box and Muller, 1958)."""
    u, v = _unit_pair(random_bits(keys, stream, (n + 1) // 2))
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = v.mul_(2.0 * math.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :n]


def keep_mask(keys: Tensor, stream: int, n: int, keep: float) -> Tensor:
    """bool ``[B, n]``, true with probability ``keep`` (resolution 2^-16: four draws share 64 random bits)."""
    quarter = random_bits(keys, stream, (n + 3) // 4).view(torch.int16)
    return quarter[:, :n] < keep_threshold(keep)


def keep_threshold(keep: float) -> int:
    """Below which of -32,768 to 32,767 a number of 16 random bits is with probability ``keep``."""
    return min(round(keep * 65536), 65535) - 32768
