"""How many parameters a backbone has, how much it computes, and which width gives a wanted number of parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch

from bgen.config.backbone import BackboneConfig
from bgen.models.backbones.registry import build_backbone

MOST_STEPS = 2048
"""Widths that are tried, at most, in steps."""


def backbone_parameters(size: int, config: BackboneConfig) -> int:
    """Count the parameters of a backbone on latents of ``size`` dimensions, without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_backbone(size, config).parameters())


def backbone_flops(size: int, config: BackboneConfig, B: int, T: int, N: int) -> int:
    """Floating-point operations of a forward pass over ``[B, T, N, D]``, D = ``size``, without memory for the network.

    Training costs three times this; see :mod:`bgen.nn.flops` for what is counted.
    """
    with torch.device("meta"):
        return build_backbone(size, config).flops(B, T, N)


def with_parameters(size: int, settings: Mapping[str, Any], target: int, step: int = 8) -> BackboneConfig:
    """Return a backbone's settings with the width, a multiple of ``step``, that brings it nearest to ``target``."""

    def of_width(width: int) -> BackboneConfig:
        return BackboneConfig.model_validate({**settings, "width": width})

    def parameters(multiple: int) -> int:
        return backbone_parameters(size, of_width(multiple * step))

    above = bisect_left(range(1, MOST_STEPS), target, key=parameters) + 1
    multiple = min((max(1, above - 1), above), key=lambda multiple: abs(parameters(multiple) - target))
    return of_width(multiple * step)
