"""The flow-matching loss.

Axes: B trajectories, T time points, N cells per time point, D latent size.
"""

from __future__ import annotations

from torch import Tensor


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
