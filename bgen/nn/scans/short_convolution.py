"""The causal depthwise convolution of a few points that Mamba and Hyena put in front of their recurrences.

Axes: B sequences, L points, D channels, W width of the filter.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = bias + sum over w < W of weight_w x_{t-w}, each channel by itself; before the first point stand zeros.

    Computed as W shifted multiply-adds: this needs no kernel, and keeps packed sequences apart.
    """

    decayed = ()

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x_BLD: Tensor, sequence_BL: Tensor | None = None) -> Tensor:
        """Convolve ``[B, L, D]`` along L; points of another sequence count as zeros."""
        y_BLD = torch.addcmul(self.bias, x_BLD, self.weight[0])
        length = x_BLD.shape[1]
        for back in range(1, min(len(self.weight), length)):
            earlier_BLD = x_BLD[:, : length - back]
            if sequence_BL is not None:
                same_BL = sequence_BL[:, back:] == sequence_BL[:, : length - back]
                earlier_BLD = earlier_BLD * same_BL[..., None]
            y_BLD = y_BLD + F.pad(earlier_BLD * self.weight[back], (0, 0, back, 0))
        return y_BLD
