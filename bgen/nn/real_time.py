"""Gaps of real time as the step sizes of a state-space model, and running it in both directions of time.

The state decays over the gap between two observed points, and an input enters as an impulse, whatever the gap before
it. So an unobserved point may be inserted anywhere: its gap and the next one add up to the old gap, and it brings no
impulse. (With an input that grows with the gap, as in Mamba for text, the same insertion changed outputs by 2.5.)

Axes: B sequences, L points, H heads or channels, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgen.nn.points import Points, previous_valid

SMALLEST_STEP = 1e-3
"""Floor of a step size between valid points, in units of time at rate 1. A fused kernel multiplies its input by the
step, so an impulse is handed to it as x / step. Below this floor the gradient of the step drowns in rounding (relative
error 4e-4 at the floor, 3e-2 at 1e-5, useless at 1e-7). Replicates, which have no gap, get the floor.
"""


def gaps(points: Points, x_BLD: Tensor) -> Tensor:
    """Time since the valid point before, ``[B, L]``: 0 at a sequence's first point and where there is no point.

    ``x_BLD`` gives the shape, the device and the narrowest dtype; the result is float32 or wider. Without times the
    points stand one unit apart.
    """
    B, L = x_BLD.shape[:2]
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    time_BL = points.time_BL
    if time_BL is None:
        time_BL = torch.arange(L, device=x_BLD.device, dtype=wide).expand(B, L)
    before_BL = previous_valid(points, L, x_BLD.device).expand(B, L)
    from_BL = before_BL.clamp_min(0)
    zero = time_BL.new_zeros(())
    gap_BL = torch.where(before_BL >= 0, time_BL - time_BL.gather(1, from_BL), zero)
    if points.sequence_BL is not None:
        gap_BL = torch.where(points.sequence_BL.gather(1, from_BL) == points.sequence_BL, gap_BL, zero)
    if points.valid_BL is not None:
        gap_BL = torch.where(points.valid_BL, gap_BL, zero)
    return gap_BL.to(wide)


def step_sizes(rate_BLH: Tensor, gap_BL: Tensor, points: Points) -> Tensor:
    """Return dt = rate * gap, ``[B, L, H]``, not below the floor at points that exist and exactly 0 at others."""
    step_BLH = (rate_BLH * gap_BL[..., None]).clamp_min(SMALLEST_STEP)
    return step_BLH if points.valid_BL is None else points.blank(step_BLH)


def both_directions(x_BLD: Tensor, points: Points) -> tuple[Tensor, Points]:
    """Stack a batch and its reverse along the batch axis, ``[2 B, L, D]``, so that one call runs both."""
    return torch.cat([x_BLD, x_BLD.flip(1)]), points.beside(points.reversed())


def split_directions(y_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Undo :func:`both_directions`: forward and backward results, both in the order of time, each ``[B, L, D]``."""
    forward_BLD, backward_BLD = y_BLD.chunk(2)
    return forward_BLD, backward_BLD.flip(1)
