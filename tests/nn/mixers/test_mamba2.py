"""The Mamba-2 block against its formula, point by point, and its choice of kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bgen.config.backbone import Mamba1Config, Mamba2Config, TimeConfig
from bgen.errors import UserError
from bgen.nn.mixers.mamba1 import Mamba1
from bgen.nn.mixers.mamba2 import Mamba2
from bgen.nn.points import Points
from bgen.nn.scans import published_kernels as kernels
from bgen.nn.scans.ssd import ssd_sequential

torch.set_num_threads(1)


def by_formula(block: Mamba2, u: Tensor, gap: Tensor) -> Tensor:
    """The docstring's formulas, causal, with the short convolution as torch has it and the recurrence as a loop."""
    maps = block.config.groups * block.config.state
    z, x, b, c, rate = (u @ block.in_proj.weight.T).split([block.inner, block.inner, maps, maps, block.heads], dim=-1)
    xbc = torch.cat([x, b, c], dim=-1)
    if block.convolution is not None:
        weight = block.convolution.weight.T.flip(1)[:, None]  # torch counts from the oldest point
        xbc = F.conv1d(xbc.mT, weight, block.convolution.bias, padding=weight.shape[2] - 1, groups=xbc.shape[2])
        xbc = xbc[..., : u.shape[1]].mT
    x, b, c = F.silu(xbc).split([block.inner, maps, maps], dim=-1)
    dt = (1 + (rate + block.dt_bias).exp()).log()
    if block.real_time:
        dt = (dt * gap[..., None]).clamp_min(1e-3)
    x = x.unflatten(-1, (block.heads, -1))
    b, c = (t.unflatten(-1, (block.config.groups, -1)) for t in (b, c))
    y, _ = ssd_sequential(x if block.real_time else x * dt[..., None], -dt * block.A_log.exp(), b, c)
    y = (y + block.D[:, None] * x).flatten(-2) * z * torch.sigmoid(z)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
    return y @ block.out_proj.weight.T


@pytest.mark.parametrize("real_time", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_block_equals_formula(real_time: bool, groups: int) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(head_width=8, state=6, groups=groups)
    block = Mamba2(16, config, TimeConfig(direction="causal", real_time=real_time)).double()
    u = torch.randn(3, 70, 16, dtype=torch.float64)
    time = torch.rand(3, 70, dtype=torch.float64).mul(3).round(decimals=1).cumsum(1)  # with replicates, gap 0
    gap = F.pad(time.diff(dim=1), (1, 0))
    torch.testing.assert_close(block(u, Points(None, time)), by_formula(block, u, gap), rtol=0, atol=1e-12)
    if real_time:
        assert (block(u, Points(None, 1.01 * time)) - by_formula(block, u, gap)).abs().max() > 1e-4


def test_rates_start_in_their_range() -> None:
    for real_time, slowest, fastest in ((True, 0.02, 0.5), (False, 1e-3, 0.1)):
        block = Mamba2(64, Mamba2Config(head_width=1), TimeConfig(real_time=real_time))
        rate = F.softplus(block.dt_bias)
        assert block.dt_bias.shape == (2, 128)
        assert slowest * 0.999 < rate.min() < 2 * slowest
        assert fastest / 2 < rate.max() < fastest * 1.001


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(kernels, "missing", lambda mixer: f"No module named '{mixer}'")
    for mixer in ("mamba2", "mamba1"):
        assert not kernels.use_fused(mixer, "auto", cpu)
        assert not kernels.use_fused(mixer, "torch", cuda)
        for backend, device in (("auto", cuda), ("fused", cuda), ("fused", cpu)):
            with pytest.raises(UserError, match=r"--no-deps mamba-ssm==2\.3\.2\.post1") as caught:
                kernels.use_fused(mixer, backend, device)
            assert f"{mixer}.backend to torch" in str(caught.value)
            assert ("SKIP_CUDA_BUILD" in str(caught.value)) == (mixer == "mamba2")
    monkeypatch.setattr(kernels, "missing", lambda mixer: None)
    assert kernels.use_fused("mamba2", "auto", cuda)
    assert not kernels.use_fused("mamba2", "auto", cpu)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_fused_without_the_package_says_how_to_install_it(mixer: str) -> None:
    if kernels.missing(mixer) is None:
        pytest.skip("mamba-ssm is installed here")
    block = (
        Mamba2(16, Mamba2Config(head_width=8, backend="fused"), TimeConfig())
        if mixer == "mamba2"
        else Mamba1(16, Mamba1Config(backend="fused"), TimeConfig())
    )
    with pytest.raises(UserError, match="pip install --no-build-isolation"):
        block(torch.randn(1, 3, 16), Points())
