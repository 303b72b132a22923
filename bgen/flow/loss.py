"""The flow-matching loss, and a loss on where populations end.

Axes: B trajectories, T time points, N cells per time point, D latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROOT_AT_ZERO = 1e-4
"""Added to squared distances, so that the root has a slope at zero."""


def velocity_loss(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of ``||predicted - target||^2 / D`` over the cells of each trajectory, ``[B]`` in float32.

    ``predicted`` and ``target`` are ``[B, T, N, D]``; ``mask`` bool ``[B, T, N]`` names the cells that count (all, if
    None). A trajectory without any has loss 0.
    """
    squared = (predicted.float() - target.float()).square().mean(dim=-1)
    if mask is None:
        return squared.mean(dim=(1, 2))
    weight = mask.to(squared.dtype)
    return (squared * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp_min(1.0)


def endpoint_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over time points of the energy distance between two populations, ``[B]`` in float32.

    2 E|x - y| - E|x - x'| - E|y - y'| over distinct cells: the same for every pairing of the two, and 0 in expectation
    for two samples of one population (Szekely and Rizzo, 2013).

    Parameters
    ----------
    predicted, target
        ``[B, T, N, D]``.
    mask
        bool ``[B, T, N]``: cells that count, the same of both. Time points with fewer than two are left out.
    """
    x, y, there = predicted.float().flatten(0, 1), target.float().flatten(0, 1), mask.flatten(0, 1).float()
    n = there.sum(1)
    counts = n >= 2
    pairs = there[:, :, None] * there[:, None]
    others = pairs * (1 - torch.eye(there.shape[1], device=x.device))

    def mean(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        squared = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None] - 2 * a @ b.transpose(1, 2)
        distance = (squared.clamp_min(0) + _ROOT_AT_ZERO).sqrt()
        return (distance * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1.0)

    energy = (2 * mean(x, y, pairs) - mean(x, x, others) - mean(y, y, others)) * counts
    per_point, enough = energy.view(mask.shape[:2]), counts.view(mask.shape[:2])
    return per_point.sum(1) / enough.sum(1).clamp_min(1)
