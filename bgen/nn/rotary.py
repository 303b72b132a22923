"""Rotary embedding of real time: queries and keys turn by angles in proportion to their time.

The product of a query and a key then depends only on the difference of their times, whatever lies between them (Su et
al., arXiv 2104.09864, with times in place of positions).

Axes: B sequences, L points, H heads, P channels per head, F = P / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Turn pairs of channels.

    Parameters
    ----------
    channels
        P, even.
    shortest, longest
        Periods of the first and the last pair, in units of time; those between are spaced evenly in logarithm.
    """

    frequency: Tensor

    def __init__(self, channels: int, shortest: float, longest: float) -> None:
        super().__init__()
        # On the CPU also where a module is made without memory, as in :class:`bgen.nn.embedding.TimeEmbedding`.
        period_F = torch.logspace(
            math.log(shortest), math.log(longest), channels // 2, base=math.e, dtype=torch.float64, device="cpu"
        )
        self.register_buffer("frequency", (2 * math.pi / period_F).float(), persistent=False)

    def forward(self, x_BHLP: Tensor, time_BL: Tensor) -> Tensor:
        """Turn ``[B, H, L, P]`` by ``[B, L]``. Angles are float32 or wider, the result has the dtype of x."""
        wide = torch.promote_types(torch.promote_types(x_BHLP.dtype, time_BL.dtype), torch.float32)
        angle_B1LF = time_BL.to(wide)[:, None, :, None] * self.frequency
        cos, sin = angle_B1LF.cos(), angle_B1LF.sin()
        first, second = x_BHLP.to(wide).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BHLP.dtype)
