"""Causal convolution with a filter as long as the sequence: y_t = sum over s <= t of k_s u_{t-s}.

Axes: ``...`` leading axes that broadcast, L points, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convolve_direct(u_LD: Tensor, k_LD: Tensor) -> Tensor:
    """Sum term by term, at a cost that grows with L^2: the reference. Both are ``[..., L, D]``."""
    y = []
    for t in range(u_LD.shape[-2]):
        y.append((k_LD[..., : t + 1, :] * u_LD[..., : t + 1, :].flip(-2)).sum(-2))
    return torch.stack(y, dim=-2)


def convolve_fft(u_LD: Tensor, k_LD: Tensor) -> Tensor:
    """Convolve through Fourier transforms of twice the length, so that the end doesn't wrap round to the start.

    Computed in float32 or wider, also under autocast: FFTs of bfloat16 lose the tails. Result in the dtype of u.
    """
    length = u_LD.shape[-2]
    wide = torch.promote_types(torch.promote_types(u_LD.dtype, k_LD.dtype), torch.float32)
    u_hat = torch.fft.rfft(u_LD.to(wide), n=2 * length, dim=-2)
    k_hat = torch.fft.rfft(k_LD.to(wide), n=2 * length, dim=-2)
    return torch.fft.irfft(u_hat * k_hat, n=2 * length, dim=-2)[..., :length, :].to(u_LD.dtype)
