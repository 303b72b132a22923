"""Root-mean-square normalisation, computed in float32 or wider also under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """weight x / sqrt(mean(x^2) + eps) over the last axis, ``[..., D]``; the result has the dtype of x.

    (torch's own, given bfloat16 and float32 weights as autocast does, warns and takes a slow path.)
    """

    decayed = ()

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return F.rms_norm(wide, self.weight.shape, self.weight, self.eps).to(x.dtype)
