"""Floating-point operations, by formula: 2 for each multiply-add of a matrix product.

The method ``flops`` of every block tells the operations of its forward pass. Elementwise work is left out, as is usual
for MFU: the scans of mamba1 and s4d (about 9 B T E S), FFTs, norms, softmax. Training costs three times the forward
pass, unless a block says otherwise; work that is done again (activation checkpointing) is not counted.
"""

from __future__ import annotations

from torch import nn


def linear(points: int, inputs: int, outputs: int) -> int:
    """Apply a matrix to every point."""
    return 2 * points * inputs * outputs


def layers(points: int, *modules: nn.Module) -> int:
    """Apply all linear layers among or inside the modules to every point."""
    found = (layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(linear(points, layer.in_features, layer.out_features) for layer in found)
