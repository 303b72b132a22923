"""The selective scan and the Mamba-1 block against their formulas, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgen.config.backbone import Mamba1Config, TimeConfig
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.points import Points
from bgen.nn.scans.selective_scan import selective_scan, selective_scan_sequential

torch.set_num_threads(1)


@pytest.mark.parametrize("T", [1, 5, 16, 37])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_equals_loop(T: int, packed: bool) -> None:
    g = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    leaves = [normal(2, T, 3), normal(2, T, 3).exp(), -normal(3, 4).exp(), normal(2, T, 4), normal(2, T, 4)]
    for leaf in leaves:
        leaf.requires_grad_()
    sequence = torch.randint(0, 2, (2, T), generator=g).cumsum(1) if packed else None
    expected = selective_scan_sequential(*leaves, sequence_BT=sequence)
    found = selective_scan(*leaves, sequence_BT=sequence)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weight = normal(*found.shape)
    for mine, reference in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("real_time", [True, False])
def test_block_equals_formula(real_time: bool) -> None:
    torch.manual_seed(0)
    block = Mamba1(16, Mamba1Config(state=4), TimeConfig(direction="causal", real_time=real_time)).double()
    u = torch.randn(2, 20, 16, dtype=torch.float64)
    time = torch.rand(2, 20, dtype=torch.float64).cumsum(1)
    z, x = (u @ block.in_proj.weight.T).chunk(2, dim=-1)
    if block.convolution is not None:
        weight = block.convolution.weight.T.flip(1)[:, None]
        x = F.conv1d(x.mT, weight, block.convolution.bias, padding=3, groups=32)[..., :20].mT
    x = F.silu(x)
    x_proj, dt_proj = block.x_proj[0], block.dt_proj[0]
    assert isinstance(x_proj, nn.Linear)
    assert isinstance(dt_proj, nn.Linear)
    low, b, c = (x @ x_proj.weight.T).split([1, 4, 4], dim=-1)
    dt = (1 + (low @ dt_proj.weight.T + dt_proj.bias).exp()).log()
    if real_time:
        dt = (dt * F.pad(time.diff(dim=1), (1, 0))[..., None]).clamp_min(1e-3)
    y = selective_scan_sequential(x if real_time else x * dt, dt, -block.A_log.exp(), b, c) + block.D * x
    expected = (y * z * torch.sigmoid(z)) @ block.out_proj.weight.T
    torch.testing.assert_close(block(u, Points(None, time)), expected, rtol=0, atol=1e-12)
