"""Embeddings of flow time and of numbers.

Axes: C width of the embedding; ``...`` any leading axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bgen.nn.flops import layers

_FREQUENCIES = 32
_HIGHEST = 64.0


class TimeEmbedding(nn.Module):
    """Flow time ``t [...]`` in [0, 1] to ``[..., C]``: sines and cosines of 1/4 to 64 turns, then a small network."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # On the CPU also where a module is made without memory: torch loads its compiler for a sequence there.
        turns = torch.logspace(math.log2(0.25), math.log2(_HIGHEST), _FREQUENCIES, base=2.0, device="cpu")
        self.register_buffer("frequencies", 2 * math.pi * turns, persistent=False)
        self.network = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t``."""
        angle = t[..., None].float() * self.frequencies
        return self.network(torch.cat((angle.cos(), angle.sin()), dim=-1))

    def flops(self, points: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""
        return layers(points, self.network)


class CategoryEmbedding(nn.Module):
    """A learned vector per category; the unknown, -1, is the zero vector (``zero_unknown``) or a learned one.

    Parameters
    ----------
    categories
        Number of categories.
    width
        C.
    zero_unknown
        Whether the vector of the unknown is fixed at zero, as in a one-hot encoding.
    """

    def __init__(self, categories: int, width: int, *, zero_unknown: bool) -> None:
        super().__init__()
        self.categories = categories
        self.table = nn.Embedding(categories + 1, width, padding_idx=0 if zero_unknown else None)

    def forward(self, codes: Tensor) -> Tensor:
        """Embed int64 ``codes [...]`` from -1 to ``categories - 1``."""
        return self.table(codes + 1)

    @torch.no_grad()
    def start_categories(self, known: int) -> None:
        """Let all categories but the first ``known`` start like the unknown."""
        self.table.weight[1 + known :] = self.table.weight[0]


class NumberEmbedding(nn.Module):
    """A number, standardised by known statistics, to ``[..., C]``; the unknown, NaN, has a learned vector.

    Parameters
    ----------
    mean, std
        Statistics of the column over the training cells, in its unit.
    width
        C.
    """

    decayed = ()
    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std) if std > 0 else 1.0))
        self.network = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.unknown = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor) -> Tensor:
        """Embed float ``values [...]``."""
        known = ~values.isnan()
        standard = torch.where(known, (values - self.mean) / self.std, 0.0)
        return torch.where(known[..., None], self.network(standard[..., None]), self.unknown)

    def flops(self, points: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""
        return layers(points, self.network)
