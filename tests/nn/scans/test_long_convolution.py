"""S4D and Hyena: FFT against direct sums, recurrent against convolutional, and the published operators' formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bgen.config.backbone import HyenaConfig, S4DConfig, TimeConfig
from bgen.errors import UserError
from bgen.nn.mixers.hyena import Hyena
from bgen.nn.mixers.s4d import S4D
from bgen.nn.points import Points
from bgen.nn.scans.long_convolution import convolve_direct, convolve_fft
from bgen.nn.scans.short_convolution import ShortConvolution

torch.set_num_threads(1)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_fft_equals_direct(length: int) -> None:
    g = torch.Generator().manual_seed(length)
    u = torch.randn(2, 3, length, 4, generator=g, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, length, 4, generator=g, dtype=torch.float64, requires_grad=True)
    found, expected = convolve_fft(u, k), convolve_direct(u, k)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weight = torch.randn(found.shape, generator=g, dtype=torch.float64)
    for mine, reference in zip(
        torch.autograd.grad((found * weight).sum(), (u, k)),
        torch.autograd.grad((expected * weight).sum(), (u, k)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)


def test_fft_stays_float32_under_autocast_and_for_bfloat16() -> None:
    g = torch.Generator().manual_seed(0)
    u, k = (torch.randn(1, 2048, 4, generator=g) for _ in "uk")
    exact = convolve_fft(u.double(), k.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (convolve_fft(u, k) - exact).abs().max() / exact.abs().max() < 1e-6
    assert convolve_fft(u.bfloat16(), k).dtype == torch.bfloat16


@pytest.mark.parametrize("width", [1, 3, 4])
def test_short_convolution_equals_torchs(width: int) -> None:
    torch.manual_seed(0)
    convolution = ShortConvolution(5, width).double()
    for length in (1, 2, 9):
        x = torch.randn(2, length, 5, dtype=torch.float64)
        weight = convolution.weight.T.flip(1)[:, None]  # torch counts from the oldest point
        expected = F.conv1d(x.mT, weight, convolution.bias, padding=width - 1, groups=5)[..., :length].mT
        torch.testing.assert_close(convolution(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_s4d_recurrent_equals_convolutional(direction: str) -> None:
    torch.manual_seed(0)
    time = TimeConfig.model_validate({"direction": direction})
    recurrent = S4D(6, S4DConfig(state=16), time).double()
    convolutional = S4D(6, S4DConfig(state=16, form="convolutional"), time.model_copy(update={"real_time": False}))
    convolutional.double().load_state_dict(recurrent.state_dict())
    u = torch.randn(2, 50, 6, dtype=torch.float64)
    grid = torch.arange(50, dtype=torch.float64).expand(2, 50) + 7
    expected = convolutional(u, Points(None, grid))
    torch.testing.assert_close(recurrent(u, Points(None, grid)), expected, rtol=0, atol=1e-10)
    assert (recurrent(u, Points(None, 1.01 * grid)) - expected).abs().max() > 1e-6


def test_s4d_equals_its_published_formula() -> None:
    torch.manual_seed(0)
    L = 12
    module = S4D(3, S4DConfig(state=4, form="convolutional"), TimeConfig(direction="causal", real_time=False)).double()
    u = torch.randn(1, L, 3, dtype=torch.float64)
    kernel = torch.zeros(L, 3, dtype=torch.float64)
    c = torch.view_as_complex(module.C.detach())[0]
    for d in range(3):
        dt = float(module.log_dt[d].exp().detach())
        for n in range(2):
            a = complex(-float(module.A_log[d, n].exp().detach()), float(module.A_imag[d, n].detach()))
            gain = complex(c[d, n]) * (math.e ** (a * dt) - 1) / a
            for place in range(L):
                kernel[place, d] += 2 * (gain * math.e ** (a * dt * place)).real
    y = F.gelu(convolve_direct(u, kernel) + module.D * u) @ module.out_proj.weight.T + module.out_proj.bias
    expected = y[..., :3] * torch.sigmoid(y[..., 3:])
    torch.testing.assert_close(module(u, Points()), expected, rtol=0, atol=1e-10)


def published_hyena(module: Hyena, config: HyenaConfig, u: Tensor, shift: float) -> Tensor:
    """The operator of order 2 as its two publications print it, with a direct sum for the long convolution."""
    L, D = u.shape[1:]
    uc = u @ module.in_proj.weight.T + module.in_proj.bias
    weight = module.convolution.weight.T.flip(1)[:, None]
    uc = F.conv1d(uc.mT, weight, module.convolution.bias, padding=2, groups=3 * D)[..., :L].mT
    x0, x1, v = uc.split(D, dim=-1)
    t = torch.linspace(0, 1, config.max_length, dtype=torch.float64)[:, None]
    w = 2 * math.pi * torch.arange(config.max_length, dtype=torch.float64)[:, None] / config.max_length
    f = torch.linspace(1e-4, config.bands - 1, config.bands, dtype=torch.float64)[None]
    wave = torch.exp(-1j * f * w)
    h = torch.cat([t, wave.real, wave.imag], dim=-1)
    for linear in module.filter.hidden:
        h = torch.sin(module.filter.sine.frequency * (h @ linear.weight.T + linear.bias))
    h = h @ module.filter.output.weight.T
    deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, D, dtype=torch.float64)
    k = (h * (torch.exp(-t * deltas.abs()) + shift))[:L]
    v = v * x1
    v = convolve_direct(v, k) + v * module.bias[0, 0]
    return (v * x0) @ module.out_proj.weight.T + module.out_proj.bias


@pytest.mark.parametrize("shift", [0.05, 0.0])
def test_hyena_equals_the_published_operators(shift: float) -> None:
    """HyenaDNA adds 0.05 to the window, safari nothing; each is reproduced, and the other is told from it."""
    torch.manual_seed(0)
    config = HyenaConfig(max_length=40, filter_width=16, bands=3, shift=shift)
    module = Hyena(4, config, TimeConfig(direction="causal", real_time=False))
    module.double()
    u = torch.randn(2, 33, 4, dtype=torch.float64)
    found = module(u, Points())
    # The module's tables of places are made in float32.
    torch.testing.assert_close(found, published_hyena(module, config, u, shift), rtol=0, atol=1e-6)
    assert (found - published_hyena(module, config, u, 0.05 - shift)).abs().max() > 1e-4


def test_hyena_of_higher_order_and_too_long() -> None:
    torch.manual_seed(0)
    module = Hyena(4, HyenaConfig(order=3, max_length=10), TimeConfig(real_time=False))
    module(torch.randn(2, 10, 4), Points()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    with pytest.raises(UserError, match=r"11 time points .* hyena.max_length = 10"):
        module(torch.randn(2, 11, 4), Points())
