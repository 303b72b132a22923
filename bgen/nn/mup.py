"""muP: starts and learning rates that let the learning rate found at a small width serve a large one.

With m = width / base width, for Adam:

    matrix with inputs that grow with the width, W [out, in]      learning rate x base in / in  (1 / m)
    of these, those whose outputs do not grow (heads)             start x sqrt(base in / in)
    everything else (inputs of fixed size, norms, biases, ...)    as it is

Linear layers start with a spread of 1 / sqrt(in) anyway, as muP wants it. Attention keeps the width of its heads and
gets more of them, so its logits need no factor. At the base width nothing changes.
Source: Yang et al., arXiv 2203.03466, table 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Transfers(Protocol):
    """A module whose learning rate was found at a smaller width."""

    def learning_rate_scales(self) -> dict[str, float]:
        """Map parameter names to multiples of the learning rate; parameters that are left out get 1."""
        ...


def learning_rate_scales(module: nn.Module, twin: nn.Module) -> dict[str, float]:
    """Map the weights of ``module`` to multiples of the learning rate; ``twin`` is the module at the base width."""
    scales = {name: ratio for name, _, ratio in _widened(module, twin) if ratio != 1}
    return {f"{name}.weight" if name else "weight": ratio for name, ratio in scales.items()}


@torch.no_grad()
def start_heads(module: nn.Module, twin: nn.Module) -> None:
    """Scale the start of the layers whose inputs grow with the width and whose outputs do not."""
    others = dict(twin.named_modules())
    for name, layer, ratio in _widened(module, twin):
        other = others[name]
        assert isinstance(other, nn.Linear)
        if layer.out_features == other.out_features:
            layer.weight.mul_(ratio**0.5)


def _widened(module: nn.Module, twin: nn.Module) -> Iterator[tuple[str, nn.Linear, float]]:
    """Linear layers: name, layer, inputs of the twin's over its own."""
    others = dict(twin.named_modules())
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            other = others[name]
            assert isinstance(other, nn.Linear), "a twin differs in sizes only"
            yield name, layer, other.in_features / layer.in_features
