"""Softmax attention: among cells (no positions), over time (rotary by real time), and between two sets.

    y_i = W_o sum over j of softmax_j(q_i . k_j / sqrt(P)) v_j

Queries and keys are normalised per head, which bounds the logits (Henry et al., arXiv 2010.04245).

Axes: B sequences or populations, L points that ask, S points that are asked, D width, H heads of P channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.backbone import AttentionConfig, TimeConfig
from bgen.nn.flops import layers
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.norm import RMSNorm
from bgen.nn.points import Points
from bgen.nn.rotary import Rotary


def attend_plain(q_BHLP: Tensor, k_BHSP: Tensor, v_BHSP: Tensor, allowed: Tensor | None) -> Tensor:
    """Attend by the formula, ``[B, H, L, P]``: the reference of :func:`attend`."""
    logit_BHLS = q_BHLP @ k_BHSP.transpose(-1, -2) / q_BHLP.shape[-1] ** 0.5
    if allowed is None:
        return logit_BHLS.softmax(-1) @ v_BHSP
    weight_BHLS = logit_BHLS.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.where(allowed.any(-1, keepdim=True), weight_BHLS, 0.0) @ v_BHSP


def attend(q_BHLP: Tensor, k_BHSP: Tensor, v_BHSP: Tensor, allowed: Tensor | None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, ``[B, H, L, P]``; zero where nothing may be seen.

    Parameters
    ----------
    allowed
        bool, broadcasts to ``[B, H, L, S]``: who may see whom. None: everyone.
    causal
        A point sees only points up to itself; needs ``allowed`` None.
    """
    if allowed is None:
        return F.scaled_dot_product_attention(q_BHLP, k_BHSP, v_BHSP, is_causal=causal)
    # A row that may see nothing would be 0 / 0: let it see everything, and do not use its result.
    some = allowed.any(-1, keepdim=True)
    y_BHLP = F.scaled_dot_product_attention(q_BHLP, k_BHSP, v_BHSP, attn_mask=allowed | ~some)
    return torch.where(some, y_BHLP, y_BHLP.new_zeros(()))


class Attention(nn.Module):
    """Multi-head attention of one set of points to another, or to itself."""

    def __init__(self, width: int, config: AttentionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        norm = width // config.heads if config.qk_norm else None
        self.q_norm = nn.Identity() if norm is None else RMSNorm(norm)
        self.k_norm = nn.Identity() if norm is None else RMSNorm(norm)

    def project(self, x_BLD: Tensor, source_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H, L, P]``, keys and values ``[B, H, S, P]``."""
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q_proj(x_BLD), *self.kv_proj(source_BSD).chunk(2, dim=-1))
        )
        return self.q_norm(q), self.k_norm(k), v

    def combine(self, y_BHLP: Tensor) -> Tensor:
        """Heads back to ``[B, L, D]``."""
        return self.out_proj(y_BHLP.transpose(1, 2).flatten(-2))

    def forward(self, x_BLD: Tensor, source_BSD: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Let ``x_BLD`` ask ``source_BSD``; points that are not ``valid_BS`` are not seen, whatever stands there."""
        if valid_BS is not None:
            source_BSD = torch.where(valid_BS[..., None], source_BSD, source_BSD.new_zeros(()))
        q, k, v = self.project(x_BLD, source_BSD)
        return self.combine(attend(q, k, v, None if valid_BS is None else valid_BS[:, None, None]))

    def flops(self, B: int, L: int, S: int) -> int:
        """Floating-point operations of L points that ask S points, masked or not; see :mod:`bgen.nn.flops`."""
        products = 4 * B * L * S * self.q_proj.out_features
        return layers(B * L, self.q_proj, self.out_proj) + layers(B * S, self.kv_proj) + products


class CellAttention(Mixer):
    """Attention among the cells of one population: no positions, so permuting the cells permutes the result."""

    def __init__(self, width: int, config: AttentionConfig) -> None:
        super().__init__()
        self.attention = Attention(width, config)

    def forward(self, x_BND: Tensor, points: Points) -> Tensor:
        """Mix ``[B, N, D]`` along N; what it holds at cells that do not exist has no meaning."""
        x_BND = points.blank(x_BND)
        return self.attention(x_BND, x_BND, points.valid_BL)

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`."""
        return self.attention.flops(B, L, L)


class TimeAttention(Mixer):
    """Attention over time points, which knows the real time between two points by rotary angles."""

    def __init__(self, width: int, config: AttentionConfig, time: TimeConfig) -> None:
        super().__init__()
        self.attention = Attention(width, config)
        self.rotary = Rotary(width // config.heads, config.shortest_period, config.longest_period)
        self.causal = time.direction == "causal"
        self.needs_regular_grid = not time.real_time

    def forward(self, x_BTD: Tensor, points: Points) -> Tensor:
        """Mix ``[B, T, D]`` along T; what it holds at points that do not exist has no meaning."""
        x_BTD = points.blank(x_BTD)
        q, k, v = self.attention.project(x_BTD, x_BTD)
        T = x_BTD.shape[1]
        time_BT = points.time_BL
        if time_BT is None or self.needs_regular_grid:
            time_BT = torch.arange(T, device=x_BTD.device)[None]
        elif points.valid_BL is not None:
            time_BT = torch.where(points.valid_BL, time_BT, time_BT.new_zeros(()))
        y = attend(self.rotary(q, time_BT), self.rotary(k, time_BT), v, self._allowed(points, T), self.causal)
        return self.attention.combine(y)

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`; masked pairs are computed too."""
        return self.attention.flops(B, L, L)

    def _allowed(self, points: Points, T: int) -> Tensor | None:
        """Return who may see whom, bool, broadcasts to ``[B, H, T, T]``; None if it is everyone, or simply the past."""
        allowed = None
        if points.valid_BL is not None:
            allowed = points.valid_BL[:, None, None]
        if points.sequence_BL is not None:
            same = (points.sequence_BL[:, :, None] == points.sequence_BL[:, None])[:, None]
            allowed = same if allowed is None else allowed & same
        if allowed is not None and self.causal:
            allowed = allowed & torch.ones(T, T, dtype=torch.bool, device=allowed.device).tril()
        return allowed
