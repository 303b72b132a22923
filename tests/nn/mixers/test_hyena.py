"""Hyena against its definition, written as loops."""

from __future__ import annotations

import torch

from bgen.config.backbone import HyenaConfig, TimeConfig
from bgen.nn.mixers.hyena import Hyena
from bgen.nn.points import Points

D, T = 4, 7


def test_gates_are_applied_from_the_last_to_the_first() -> None:
    torch.manual_seed(0)
    config = HyenaConfig(order=4, max_length=16, filter_width=8)
    mixer = Hyena(D, config, TimeConfig(direction="causal")).double()
    u = torch.randn(2, T, D, dtype=torch.float64)
    *x, v = mixer.convolution(mixer.in_proj(u)).chunk(config.order + 1, dim=-1)
    filters = mixer.filter(T).view(T, config.order - 1, D)
    for filter_TD, bias_D, gate in zip(filters.unbind(1), mixer.bias[0], x[:0:-1], strict=True):
        gated = v * gate
        v = bias_D * gated
        for t in range(T):
            for lag in range(t + 1):
                v[:, t] = v[:, t] + filter_TD[lag] * gated[:, t - lag]
    expected = mixer.out_proj(v * x[0])
    torch.testing.assert_close(mixer(u, Points(None, torch.arange(T).double().expand(2, T))), expected)
