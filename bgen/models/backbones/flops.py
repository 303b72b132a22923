"""Floating-point operations of a backbone's forward pass; see :mod:`bgen.nn.flops` for what is counted.

Axes: B trajectories, T time points, N cells per time point, D latent size.
"""

from __future__ import annotations

from bgen.config.backbone import Axis, BackboneConfig
from bgen.nn import flops

FLOW_TIME_FEATURES = 64


def backbone_flops(size: int, config: BackboneConfig, B: int, T: int, N: int, outputs: int | None = None) -> int:
    """Forward pass over ``[B, T, N, D]``, D = ``size``, to ``outputs`` (None: D); training costs three times this."""
    width = config.width
    ends = flops.linear(B * T * N, size + (outputs or size), width)
    flow_time = flops.linear(B * T, FLOW_TIME_FEATURES + width, width)
    if config.name == "mlp":
        blocks = config.layers * (_modulation(config, B * T) + 2 * flops.linear(B * T * N, width, 2 * width))
    else:
        blocks = config.layers * sum(block_flops(axis, config, B, T, N) for axis in config.axes)
    return ends + flow_time + blocks


def block_flops(axis: Axis, config: BackboneConfig, B: int, T: int, N: int) -> int:
    """One block along ``axis``, its modulation included."""
    width = config.width
    if axis == "none":
        mixer = flops.mlp(B * T * N, width, config.mlp)
    elif axis == "cells":
        if config.cells.mixer == "attention":
            mixer = flops.attention(B * T, N, N, width)
        else:
            mixer = flops.set_attention(B * T, N, config.cells.inducing, width)
    elif config.time.tracked:
        mixer = _over_time(config, B * N, T)
    else:
        M = config.time.tokens
        ends = flops.attention(B * T, M, N, width) + flops.attention(B * T, N, M, width)
        mixer = ends + _over_time(config, B * M, T)
    return _modulation(config, B * T) + mixer


def _modulation(config: BackboneConfig, points: int) -> int:
    return flops.linear(points, config.width, 3 * config.width)


def _over_time(config: BackboneConfig, B: int, T: int) -> int:
    width, time = config.width, config.time
    if time.mixer == "mamba2":
        return flops.mamba2(B, T, width, config.mamba2, time)
    if time.mixer == "mamba1":
        return flops.mamba1(B, T, width, config.mamba1, time)
    if time.mixer == "s4d":
        return flops.s4d(B, T, width)
    if time.mixer == "hyena":
        return flops.hyena(B, T, width, config.hyena, time)
    return flops.attention(B, T, T, width)
