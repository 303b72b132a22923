"""The scan of two levels against the plain loop, in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch

from bgen.nn.scans.linear_scan import scan_chunked, scan_sequential


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_chunked_equals_loop(T: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(T)
    a = (torch.rand(2, T, 3, 1, generator=g, dtype=torch.float64) * torch.ones(1, dtype=dtype)).requires_grad_()
    u = torch.randn(2, T, 3, 4, generator=g, dtype=dtype).requires_grad_()
    expected, found = scan_sequential(a, u), scan_chunked(a, u)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weight = torch.randn(expected.shape, generator=g, dtype=dtype)
    for mine, reference in zip(
        torch.autograd.grad((found * weight).sum().abs(), (a, u)),
        torch.autograd.grad((expected * weight).sum().abs(), (a, u)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


def test_a_decay_of_zero_starts_anew() -> None:
    a, u = torch.full((1, 40, 1), 0.9), torch.ones(1, 40, 1)
    a[:, 23] = 0
    h = scan_chunked(a, u)
    torch.testing.assert_close(h[:, 23:], scan_chunked(a[:, 23:], u[:, 23:]))
    assert h[0, 22, 0] > 5
