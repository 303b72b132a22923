"""Exponential moving average of the trained parameters, in float32.

Buffers are not averaged: the module's own are used with the averaged parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    r"""Average :math:`\bar w \leftarrow d\,\bar w + (1 - d)\,w` after every optimiser step.

    Early on the decay is :math:`\min(d, (1 + s) / (10 + s))`, so that the average forgets the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after the 0-based ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        current = [parameters[name].detach().float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's trained parameters with the averages."""
        for name, parameter in module.named_parameters():
            if name in self.weights:
                parameter.copy_(self.weights[name])

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module computes with the averages; afterwards it has its own weights again."""
        own = {name: p.detach().clone() for name, p in module.named_parameters() if name in self.weights}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if name in own:
                        parameter.copy_(own[name])

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Restore averages saved by name; further names are ignored."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
