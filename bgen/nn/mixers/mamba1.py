"""The Mamba block (Mamba-1), over real time or over a regular grid.

    z, x = W u;    r, b, c = W_x x;    dt = softplus(W_r r + bias) * gap
    h_t = exp(-dt_t exp(A_log)) h_{t-1} + g_t x_t b_t,    y_t = h_t . c_t + D x_t
    out = W_o (y silu(z))

with gap, g and the short convolution as in :mod:`bgen.nn.mixers.mamba2`. It has a decay per channel and state, where
Mamba-2 has one per head, and cannot be written as matrix products: use it where it models better, not for speed.
Source: Gu and Dao, arXiv 2312.00752, section 3.

Axes: B sequences, T points, D width, E inner width, S state size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.backbone import Mamba1Config, TimeConfig
from bgen.errors import UserError
from bgen.nn.flops import layers, linear
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.points import Points
from bgen.nn.real_time import both_directions, gaps, split_directions, step_sizes
from bgen.nn.scans.published_kernels import lacking, selective_scan_fused, use_fused
from bgen.nn.scans.selective_scan import selective_scan
from bgen.nn.scans.short_convolution import ShortConvolution


class Mamba1(Mixer):
    """Mix ``[B, T, D]`` along T. Backward runs have maps b, c and rates of their own."""

    decayed = ()

    def __init__(self, width: int, config: Mamba1Config, time: TimeConfig) -> None:
        super().__init__()
        self.backend = config.backend
        self.real_time = time.real_time
        self.needs_regular_grid = not time.real_time
        self.directions = 2 if time.direction == "bidirectional" else 1
        inner = config.expand * width
        rank = config.rank or math.ceil(width / 16)
        self.split = [rank, config.state, config.state]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = None if time.real_time else ShortConvolution(inner, config.convolution)
        self.x_proj = nn.ModuleList(nn.Linear(inner, sum(self.split), bias=False) for _ in range(self.directions))
        self.dt_proj = nn.ModuleList(nn.Linear(rank, inner) for _ in range(self.directions))
        slowest, fastest = (0.02, 0.5) if time.real_time else (1e-3, 1e-1)
        for layer in self.dt_proj:
            assert isinstance(layer, nn.Linear)
            nn.init.uniform_(layer.weight, -(rank**-0.5), rank**-0.5)
            rate = torch.empty(inner).uniform_(math.log(slowest), math.log(fastest)).exp_()
            layer.bias.data.copy_(rate + (-(-rate).expm1()).log())  # softplus of it is the rate
        self.A_log = nn.Parameter(torch.arange(1.0, config.state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u_BTD: Tensor, points: Points) -> Tensor:
        """Return ``[B, T, D]``; what it holds at points that do not exist has no meaning.

        Raises
        ------
        UserError
            On CUDA without mamba-ssm's compiled kernel, or with it and packed sequences, unless ``backend`` is torch.
        """
        z_BTE, x_BTE = self.in_proj(points.blank(u_BTD)).chunk(2, dim=-1)
        x_BTE, run = both_directions(x_BTE, points) if self.directions == 2 else (x_BTE, points)
        if self.convolution is not None:
            x_BTE = run.blank(F.silu(self.convolution(x_BTE, run.sequence_BL)))
        else:
            x_BTE = F.silu(x_BTE)
        rates, maps = [], []
        for x, x_proj, dt_proj in zip(x_BTE.chunk(self.directions), self.x_proj, self.dt_proj, strict=True):
            low_BTR, *bc = x_proj(x).split(self.split, dim=-1)
            rates.append(F.softplus(dt_proj(low_BTR).to(torch.promote_types(x.dtype, torch.float32))))
            maps.append(bc)
        rate_BTE = torch.cat(rates)
        b_BTS, c_BTS = (torch.cat(part) for part in zip(*maps, strict=True))
        dt_BTE = step_sizes(rate_BTE, gaps(run, x_BTE), run) if self.real_time else rate_BTE
        if use_fused("mamba1", self.backend, x_BTE.device):
            if run.sequence_BL is not None:
                raise UserError("mamba1's kernel cannot keep packed sequences apart; use mamba2, or backend torch")
            y_BTE = selective_scan_fused(x_BTE, dt_BTE, -self.A_log.exp(), b_BTS, c_BTS, impulse=self.real_time)
        else:
            gained_BTE = x_BTE if self.real_time else x_BTE * dt_BTE
            y_BTE = selective_scan(gained_BTE, dt_BTE, -self.A_log.exp(), b_BTS, c_BTS, run.sequence_BL)
        y_BTE = y_BTE + self.D * x_BTE
        if self.directions == 2:
            forward_BTE, backward_BTE = split_directions(y_BTE)
            y_BTE = forward_BTE + backward_BTE
        return self.out_proj(y_BTE.to(z_BTE.dtype) * F.silu(z_BTE))

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`: the layers (the narrow ones once a direction), and the states' products with c."""
        states = linear(self.directions * B * L, *self.A_log.shape)
        return layers(B * L, self.in_proj, self.x_proj, self.dt_proj, self.out_proj) + states

    def lacks(self, device: torch.device) -> str | None:
        """See :class:`Mixer`."""
        return lacking("mamba1", self.backend, device)
