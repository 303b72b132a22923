"""The Mamba-2 block, over real time or over a regular grid.

    z, x, b, c, r = W u
    dt = softplus(r + bias) * gap          gap = time since the point before (real time) or 1 (regular grid)
    h_t = exp(-dt_t exp(A_log)) h_{t-1} + g_t x_t b_t^T,    y_t = h_t c_t + D x_t
    out = W_o RMSNorm(y silu(z))

with g = 1 in real time (an impulse, :mod:`bgen.nn.real_time`) and g = dt on a regular grid. Only on a regular grid, a
short convolution over x, b and c comes first: over unequal gaps it would make neighbours of points that are not.
Source: Dao and Gu, arXiv 2405.21060, figure 6.

Axes: B sequences, T points, D width, E inner width, H heads of P channels, K groups of heads, S state size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.backbone import Mamba2Config, TimeConfig
from bgen.nn.flops import layers
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.norm import RMSNorm
from bgen.nn.points import Points
from bgen.nn.real_time import both_directions, gaps, split_directions, step_sizes
from bgen.nn.scans.published_kernels import lacking, ssd_fused, use_fused
from bgen.nn.scans.short_convolution import ShortConvolution
from bgen.nn.scans.ssd import ssd_chunked, ssd_flops


class Mamba2(Mixer):
    """Mix ``[B, T, D]`` along T.

    Backward runs share the input, the gate and the decays A with forward runs and have maps b, c and rates of their
    own, so that past and future are told apart. Both run in one call, stacked along the batch axis.
    """

    decayed = ()

    def __init__(self, width: int, config: Mamba2Config, time: TimeConfig) -> None:
        super().__init__()
        self.config = config
        self.real_time = time.real_time
        self.needs_regular_grid = not time.real_time
        self.directions = 2 if time.direction == "bidirectional" else 1
        self.inner = config.expand * width
        self.heads = self.inner // config.head_width
        maps = config.groups * config.state
        rates = self.heads if config.rate == "selective" else 0
        self.split = [self.inner, self.inner] + [maps, maps, rates] * self.directions
        self.in_proj = nn.Linear(width, sum(self.split), bias=False)
        self.convolution = None if time.real_time else ShortConvolution(self.inner + 2 * maps, config.convolution)
        # Rates at the start span memories of a fraction of a unit of time up to about 50 units (real time), or the
        # published range of steps.
        slowest, fastest = (0.02, 0.5) if time.real_time else (1e-3, 1e-1)
        rate = torch.empty(self.directions, self.heads).uniform_(math.log(slowest), math.log(fastest)).exp_()
        self.dt_bias = nn.Parameter(rate + (-(-rate).expm1()).log())  # softplus of it is the rate
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log_())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, u_BTD: Tensor, points: Points) -> Tensor:
        """Return ``[B, T, D]``; what it holds at points that do not exist has no meaning.

        Raises
        ------
        UserError
            On CUDA without mamba-ssm, unless ``backend`` is torch.
        """
        z_BTE, x_BTE, *maps = self.in_proj(points.blank(u_BTD)).split(self.split, dim=-1)
        b, c, rate = maps[:3]
        if self.directions == 2:
            x_BTE, run = both_directions(x_BTE, points)
            b, c, rate = (torch.cat([one, other.flip(1)]) for one, other in zip(maps[:3], maps[3:], strict=True))
        else:
            run = points
        if self.convolution is not None:
            xbc = F.silu(self.convolution(torch.cat([x_BTE, b, c], dim=-1), run.sequence_BL))
            x_BTE, b, c = xbc.split([self.inner, b.shape[-1], c.shape[-1]], dim=-1)
            x_BTE = run.blank(x_BTE)
        else:
            x_BTE, b, c = F.silu(x_BTE), F.silu(b), F.silu(c)
        y_BTE = self._recur(x_BTE, self._steps(rate, run, x_BTE), b, c, run)
        if self.directions == 2:
            forward_BTE, backward_BTE = split_directions(y_BTE)
            y_BTE = forward_BTE + backward_BTE
        return self.out_proj(self.norm(y_BTE * F.silu(z_BTE)))

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`."""
        scan = ssd_flops(self.directions * B, L, self.inner, self.config.groups, self.config.state)
        return layers(B * L, self.in_proj, self.out_proj) + scan

    def lacks(self, device: torch.device) -> str | None:
        """See :class:`Mixer`."""
        return lacking("mamba2", self.config.backend, device)

    def _steps(self, rate_BTH: Tensor, run: Points, like_BTE: Tensor) -> Tensor:
        """Return dt ``[B, T, H]``, in float32 or wider also under autocast."""
        wide = torch.promote_types(self.dt_bias.dtype, torch.float32)
        bias_B1H = self.dt_bias.to(wide).repeat_interleave(like_BTE.shape[0] // self.directions, dim=0)[:, None]
        if self.config.rate == "selective":
            rate_BTH = F.softplus(rate_BTH.to(wide) + bias_B1H)
        else:
            rate_BTH = F.softplus(bias_B1H).expand(-1, like_BTE.shape[1], -1)
        return step_sizes(rate_BTH, gaps(run, like_BTE), run) if self.real_time else rate_BTH

    def _recur(self, x_BTE: Tensor, dt_BTH: Tensor, b: Tensor, c: Tensor, run: Points) -> Tensor:
        x_BTHP = x_BTE.unflatten(-1, (self.heads, -1))
        b_BTKS, c_BTKS = (t.unflatten(-1, (self.config.groups, -1)) for t in (b, c))
        a_H = -self.A_log.to(dt_BTH.dtype).exp()
        if use_fused("mamba2", self.config.backend, x_BTE.device):
            y_BTHP, _ = ssd_fused(
                x_BTHP, dt_BTH, a_H, b_BTKS, c_BTKS, sequence_BT=run.sequence_BL, impulse=self.real_time
            )
        else:
            gained_BTHP = x_BTHP if self.real_time else x_BTHP * dt_BTH[..., None]
            y_BTHP, _ = ssd_chunked(gained_BTHP, dt_BTH * a_H, b_BTKS, c_BTKS, sequence_BT=run.sequence_BL)
        return (y_BTHP + self.D[:, None] * x_BTHP).to(x_BTE.dtype).flatten(-2)
