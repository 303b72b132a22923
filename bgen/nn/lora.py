"""Low-rank adaptation: linear layers keep their weights and learn a small change of them.

    W <- W + (alpha / r) B A,   A [r, in] random, B [out, r] zero at the start

(Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.) After training the change is added to the
weights, so the model that comes out is an ordinary one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """The change of one weight ``[out, in]``."""

    decayed = ()

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, inside = weight.shape
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.randn(rank, inside) / math.sqrt(inside))
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + self.scale * (self.b @ self.a)


def lora_layers(module: nn.Module, rank: int) -> list[str]:
    """Return the names of the linear layers that :func:`add_lora` changes: no side is below four times the rank."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and min(layer.weight.shape) >= 4 * rank
    ]


def add_lora(module: nn.Module, rank: int, alpha: float | None = None) -> list[str]:
    """Freeze a module and put a low-rank change onto each of its large linear layers; returns their names.

    ``alpha`` defaults to the rank.
    """
    module.requires_grad_(False)
    names = lora_layers(module, rank)
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear), "lora_layers names no others"
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha or float(rank)))
    return names


def merge_lora(module: nn.Module) -> None:
    """Add every change to its weight: the module has its usual parameters again."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
