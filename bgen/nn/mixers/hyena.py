"""The Hyena operator: gates and long convolutions, with filters that a small network makes from places.

    x_0, ..., x_{n-1}, v = conv3(W u)
    v <- k_o * (x v) + bias_o (x v)    for the gates x_{n-1}, ..., x_1
    y = W_o (x_0 v)
    k(l) = network(place(l)) (exp(-|delta| l / (L - 1)) + shift)

The network has sine activations; ``shift`` is 0 in the first publication's code (safari) and 0.05 in HyenaDNA's.
Filters belong to places on a grid of at most L points: a regular grid only. Sources: Poli et al., arXiv 2302.10866;
Nguyen et al., arXiv 2306.15794.

Axes: B sequences, T points, L most points, D width, R directions, O = n - 1 filters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bgen.config.backbone import HyenaConfig, TimeConfig
from bgen.errors import UserError
from bgen.nn.flops import layers
from bgen.nn.mixers.mixer import Mixer
from bgen.nn.points import Points
from bgen.nn.precision import without_autocast
from bgen.nn.real_time import both_directions, split_directions
from bgen.nn.scans.long_convolution import convolve_fft
from bgen.nn.scans.short_convolution import ShortConvolution


class Sine(nn.Module):
    """sin(frequency x), the frequency learned per channel."""

    decayed = ()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``[..., width]``."""
        return torch.sin(self.frequency * x)


class HyenaFilter(nn.Module):
    """The filters, as a function of the place.

    Parameters
    ----------
    channels
        Number of filters.
    config
        ``max_length``, ``filter_width``, ``bands`` and ``shift``.
    """

    features: Tensor
    window: Tensor

    def __init__(self, channels: int, config: HyenaConfig) -> None:
        super().__init__()
        width = config.filter_width
        self.sine = Sine(width)  # one set of frequencies for all layers, as published
        self.hidden = nn.ModuleList(nn.Linear(size, width) for size in (1 + 2 * config.bands, width, width))
        self.output = nn.Linear(width, channels, bias=False)
        place_L1 = torch.linspace(0, 1, config.max_length)[:, None]
        turn_L1 = 2 * math.pi * torch.arange(config.max_length)[:, None] / config.max_length
        angle = turn_L1 * torch.linspace(1e-4, config.bands - 1, config.bands)
        # The window falls to 1 % after 1.5 times the longest length (slowest channel) to 0.3 times (fastest).
        delta = math.log(100) * torch.linspace(1 / 1.5, 1 / 0.3, channels)
        self.register_buffer("features", torch.cat([place_L1, angle.cos(), -angle.sin()], dim=1), persistent=False)
        self.register_buffer("window", (-place_L1 * delta).exp() + config.shift, persistent=False)

    def forward(self, length: int) -> Tensor:
        """Return the first ``length`` places, ``[T, channels]``."""
        x = self.features[:length]
        for linear in self.hidden:
            x = self.sine(linear(x))
        return self.output(x) * self.window[:length]

    def flops(self, length: int) -> int:
        """Floating-point operations of the forward pass; see :mod:`bgen.nn.flops` for what is counted."""
        return layers(length, self)


class Hyena(Mixer):
    """Mix ``[B, T, D]`` along T. Backward runs have filters of their own."""

    needs_regular_grid = True
    decayed = ()

    def __init__(self, width: int, config: HyenaConfig, time: TimeConfig) -> None:
        super().__init__()
        self.order = config.order
        self.max_length = config.max_length
        self.directions = 2 if time.direction == "bidirectional" else 1
        self.in_proj = nn.Linear(width, (config.order + 1) * width)
        self.convolution = ShortConvolution((config.order + 1) * width, 3)
        self.filter = HyenaFilter(self.directions * (config.order - 1) * width, config)
        self.bias = nn.Parameter(torch.randn(self.directions, config.order - 1, width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, u_BTD: Tensor, points: Points) -> Tensor:
        """Return ``[B, T, D]``; what it holds at points that do not exist has no meaning.

        Raises
        ------
        UserError
            More points than the filters are defined on.
        """
        length = u_BTD.shape[1]
        if length > self.max_length:
            raise UserError(
                f"{length} time points are more than hyena.max_length = {self.max_length}; raise it (and train anew)"
            )
        mixed, run = self.in_proj(points.blank(u_BTD)), points
        if self.directions == 2:
            mixed, run = both_directions(mixed, points)
        # There is a bias before the convolution and one after it, so blank before and after.
        mixed = run.blank(self.convolution(run.blank(mixed)))
        *gates, v_RBTD = (t.unflatten(0, (self.directions, -1)) for t in mixed.chunk(self.order + 1, dim=-1))
        with without_autocast(u_BTD):
            filter_TROD = self.filter(length).unflatten(-1, self.bias.shape)
        filters = zip(filter_TROD.unbind(2), self.bias.unbind(1), reversed(gates[1:]), strict=True)
        for filter_TRD, bias_RD, gate_RBTD in filters:
            v_RBTD = v_RBTD * gate_RBTD
            v_RBTD = convolve_fft(v_RBTD, filter_TRD.transpose(0, 1)[:, None]) + bias_RD[:, None, None] * v_RBTD
        y_BTD = (v_RBTD * gates[0]).flatten(0, 1)
        if self.directions == 2:
            forward_BTD, backward_BTD = split_directions(y_BTD)
            y_BTD = forward_BTD + backward_BTD
        return self.out_proj(y_BTD)

    def flops(self, B: int, L: int) -> int:
        """See :class:`Mixer`: the layers, and the filters, once a batch."""
        return layers(B * L, self.in_proj, self.out_proj) + self.filter.flops(L)
