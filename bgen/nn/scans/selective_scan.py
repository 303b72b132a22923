"""The selective scan, the recurrence of Mamba (Mamba-1), as a plain loop and as a scan of two levels.

    h_t = exp(dt_t a) h_{t-1} + x_t b_t,    y_t = h_t . c_t

for each channel by itself, with S states of different decays. Source: Gu and Dao, arXiv 2312.00752, algorithm 2. The
input x comes with its gain applied (dt x in the paper).

Axes: B sequences, T points, E channels, S state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgen.nn.points import continues
from bgen.nn.precision import without_autocast
from bgen.nn.scans.linear_scan import scan_chunked


def selective_scan_sequential(
    x_BTE: Tensor, dt_BTE: Tensor, a_ES: Tensor, b_BTS: Tensor, c_BTS: Tensor, sequence_BT: Tensor | None = None
) -> Tensor:
    """Return ``y_BTE``, point by point from a zero state: the reference.

    The state starts again from zero where the number in ``sequence_BT`` changes.
    """
    h_BES = x_BTE.new_zeros(*x_BTE[:, 0].shape, a_ES.shape[1])
    y = []
    for t in range(x_BTE.shape[1]):
        if sequence_BT is not None and t > 0:
            h_BES = h_BES * (sequence_BT[:, t] == sequence_BT[:, t - 1])[:, None, None]
        h_BES = (dt_BTE[:, t, :, None] * a_ES).exp() * h_BES + x_BTE[:, t, :, None] * b_BTS[:, t, None]
        y.append((h_BES * c_BTS[:, t, None]).sum(-1))
    return torch.stack(y, dim=1)


def selective_scan(
    x_BTE: Tensor, dt_BTE: Tensor, a_ES: Tensor, b_BTS: Tensor, c_BTS: Tensor, sequence_BT: Tensor | None = None
) -> Tensor:
    """Compute :func:`selective_scan_sequential` with a few dozen wide operations, in float32 or wider.

    All states are in memory at once, ``[B, T, E, S]``; only the compiled kernels for CUDA avoid that.
    """
    wide = torch.promote_types(torch.promote_types(x_BTE.dtype, dt_BTE.dtype), torch.float32)
    with without_autocast(x_BTE):
        decay_BTES = (dt_BTE.to(wide)[..., None] * a_ES.to(wide)).exp()
        if sequence_BT is not None:
            decay_BTES = decay_BTES * continues(sequence_BT)[..., None, None]
        h_BTES = scan_chunked(decay_BTES, x_BTE.to(wide)[..., None] * b_BTS.to(wide)[:, :, None])
        return (h_BTES @ c_BTS.to(wide)[..., None])[..., 0].to(x_BTE.dtype)
