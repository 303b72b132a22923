"""S4D, a diagonal state-space model: recurrent over any times, or convolutional over a regular grid.

    A = -exp(A_log) + i A_imag,    C~ = C (exp(A dt) - 1) / A
    recurrent:      h_t = exp(A dt gap_t) h_{t-1} + u_t,    y_t = 2 Re C~ . h_t
    convolutional:  K_l = 2 Re C~ . exp(A dt l),            y = K * u
    out = GLU(W GELU(y + D u))

dt is the scale of a channel: how far its state moves in one unit of time. On a grid one unit apart the two forms are
the same. The gain C~ is always that of one unit, also when gaps differ, so that an input is an impulse
(:mod:`bgen.nn.real_time`). Source: Gu, Gupta, Goel and Re, arXiv 2206.11893, zero-order hold, S4D-Lin.

Axes: B sequences, T points, D width and channels, S half the state size (conjugate pairs), R directions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.backbone import S4DConfig, TimeConfig
from bgen.nn.flops import layers
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.points import Points, continues
from bgen.nn.precision import without_autocast
from bgen.nn.real_time import both_directions, gaps, split_directions
from bgen.nn.scans.linear_scan import scan_chunked
from bgen.nn.scans.long_convolution import convolve_fft


class S4D(Mixer):
    """Mix ``[B, T, D]`` along T. Backward runs share the decays of forward runs and have a C of their own."""

    decayed = ()

    def __init__(self, width: int, config: S4DConfig, time: TimeConfig) -> None:
        super().__init__()
        self.convolutional = config.form == "convolutional"
        self.real_time = time.real_time
        self.needs_regular_grid = self.convolutional or not time.real_time
        self.directions = 2 if time.direction == "bidirectional" else 1
        pairs = config.state // 2
        slowest, fastest = (1e-2, 1.0) if time.real_time else (1e-3, 1e-1)
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(math.log(slowest), math.log(fastest)))
        self.A_log = nn.Parameter(torch.full((width, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs, dtype=torch.float32).repeat(width, 1))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(self.directions, width, pairs, dtype=torch.complex64)))
        self.D = nn.Parameter(torch.randn(width))
        self.out_proj = nn.Linear(width, 2 * width)

    def forward(self, u_BTD: Tensor, points: Points) -> Tensor:
        """Return ``[B, T, D]``; what it holds at points that do not exist has no meaning."""
        u_BTD = points.blank(u_BTD)
        run_BTD, run = both_directions(u_BTD, points) if self.directions == 2 else (u_BTD, points)
        with without_autocast(u_BTD):
            wide_RBTD = run_BTD.to(torch.promote_types(u_BTD.dtype, torch.float32)).unflatten(0, (self.directions, -1))
            y_RBTD = self._convolve(wide_RBTD) if self.convolutional else self._recur(wide_RBTD, run)
        y_BTD = sum(split_directions(y_RBTD.flatten(0, 1))) if self.directions == 2 else y_RBTD[0]
        return F.glu(self.out_proj(F.gelu((y_BTD + self.D * u_BTD).to(u_BTD.dtype))), dim=-1)

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`: only the output map is a matrix product."""
        return layers(B * L, self.out_proj)

    def exponents(self) -> tuple[Tensor, Tensor]:
        """A dt ``[D, S]`` and C~ ``[R, D, S]``, complex."""
        a_DS = torch.complex(-self.A_log.exp(), self.A_imag)
        step_DS = a_DS * self.log_dt.exp()[:, None]
        return step_DS, torch.view_as_complex(self.C) * (step_DS.exp() - 1) / a_DS

    def _recur(self, u_RBTD: Tensor, run: Points) -> Tensor:
        step_DS, c_RDS = self.exponents()
        u_BTD = u_RBTD.flatten(0, 1)
        if self.real_time:
            gap_BT = gaps(run, u_BTD)
        else:
            gap_BT = torch.ones_like(u_BTD[..., 0])
        decay_BTDS = (gap_BT[..., None, None] * step_DS).exp()
        if run.sequence_BL is not None:
            decay_BTDS = decay_BTDS * continues(run.sequence_BL)[..., None, None]
        h_BTDS = scan_chunked(decay_BTDS, u_BTD[..., None].expand(*u_BTD.shape, step_DS.shape[1]).to(decay_BTDS.dtype))
        h_RBTDS = h_BTDS.unflatten(0, (self.directions, -1))
        return 2 * (h_RBTDS * c_RDS[:, None, None]).sum(-1).real

    def _convolve(self, u_RBTD: Tensor) -> Tensor:
        step_DS, c_RDS = self.exponents()
        places_T = torch.arange(u_RBTD.shape[2], device=u_RBTD.device)
        power_TDS = (places_T[:, None, None] * step_DS).exp()
        kernel_RTD = 2 * (power_TDS * c_RDS[:, None]).sum(-1).real
        return convolve_fft(u_RBTD, kernel_RTD[:, None])
