"""Floating-point operations of the mixers' forward passes, by formula: 2 for each multiply-add of a matrix product.

Elementwise work is left out, as is usual for MFU: the scans of mamba1 and s4d (about 9 B T E S), FFTs, norms, softmax.
Training costs three times the forward pass; work that is done again (activation checkpointing) is not counted.

Axes: B sequences or populations, T time points, N cells, L points that ask, S points that are asked, D width.
"""

from __future__ import annotations

import math

from bgen.config.backbone import HyenaConfig, Mamba1Config, Mamba2Config, MLPConfig, TimeConfig


def linear(points: int, inputs: int, outputs: int) -> int:
    """Apply a matrix to every point."""
    return 2 * points * inputs * outputs


def mlp(points: int, width: int, config: MLPConfig) -> int:
    """:class:`bgen.nn.mixers.mlp.MLP`."""
    return 2 * linear(points, width, config.expand * width)


def attention(B: int, L: int, S: int, width: int) -> int:
    """:class:`bgen.nn.mixers.attention.Attention` of L points to S points, masked or not."""
    return linear(2 * B * L, width, width) + linear(B * S, width, 2 * width) + 4 * B * L * S * width


def set_attention(B: int, N: int, inducing: int, width: int) -> int:
    """:class:`bgen.nn.mixers.set_transformer.SetAttention`."""
    return attention(B, inducing, N, width) + attention(B, N, inducing, width)


def ssd(B: int, T: int, inner: int, groups: int, state: int, chunk: int = 64) -> int:
    """:func:`bgen.nn.scans.ssd.ssd_chunked` without initial and final state; T counts as the whole chunks that it
    fills.

    Both halves of the weights within a chunk count, as in torch; the compiled loop for CPUs leaves out the empty one.
    """
    Q = min(T, chunk)
    C = math.ceil(T / Q)
    points = B * C * Q
    return 2 * points * Q * (groups * state + inner) + (4 * points * inner * state if C > 1 else 0)


def mamba2(B: int, T: int, width: int, config: Mamba2Config, time: TimeConfig) -> int:
    """:class:`bgen.nn.mixers.mamba2.Mamba2`."""
    runs = 2 if time.direction == "bidirectional" else 1
    inner, maps = config.expand * width, config.groups * config.state
    rates = inner // config.head_width if config.rate == "selective" else 0
    projections = linear(B * T, width, 2 * inner + runs * (2 * maps + rates)) + linear(B * T, inner, width)
    return projections + ssd(runs * B, T, inner, config.groups, config.state)


def mamba1(B: int, T: int, width: int, config: Mamba1Config, time: TimeConfig) -> int:
    """:class:`bgen.nn.mixers.mamba1.Mamba1`: projections, and the states' products with c."""
    runs = 2 if time.direction == "bidirectional" else 1
    inner, rank = config.expand * width, config.rank or math.ceil(width / 16)
    low = linear(runs * B * T, inner, rank + 2 * config.state) + linear(runs * B * T, rank, inner)
    return linear(B * T, width, 3 * inner) + low + linear(runs * B * T, inner, config.state)


def s4d(B: int, T: int, width: int) -> int:
    """:class:`bgen.nn.mixers.s4d.S4D`: only its output map is a matrix product."""
    return linear(B * T, width, 2 * width)


def hyena(B: int, T: int, width: int, config: HyenaConfig, time: TimeConfig) -> int:
    """:class:`bgen.nn.mixers.hyena.Hyena`: projections, and the network that makes the filters (once per batch)."""
    runs = 2 if time.direction == "bidirectional" else 1
    w, filters = config.filter_width, runs * (config.order - 1) * width
    network = linear(T, 1 + 2 * config.bands, w) + 2 * linear(T, w, w) + linear(T, w, filters)
    return linear(B * T, width, (config.order + 2) * width) + network
