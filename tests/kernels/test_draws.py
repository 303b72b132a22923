"""Our kernel of keyed draws against the plain form."""

from __future__ import annotations

import pytest
import torch

from bgen.nn import random
from bgen.nn.gpu import draws as on_gpu
from bgen.nn.random import Stream

NEEDED = ("triton",)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEYS = torch.tensor([0, -1, 2**63 - 1, -(2**63), 7919])


@pytest.fixture(autouse=True)
def on_kernels(kernels_run_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "usable", lambda tensor: True)
    monkeypatch.setattr(on_gpu._kernels(), "PAIRS", 16)  # a program shall not have all places


@pytest.mark.parametrize("n", [1, 2, 33])
def test_uniform_numbers_are_those_of_the_plain_form(n: int) -> None:
    drawn = on_gpu.uniform(KEYS.to(DEVICE), Stream.PATTERN, n)
    assert torch.equal(drawn.cpu(), random.uniform(KEYS, Stream.PATTERN, n))


@pytest.mark.parametrize("n", [1, 33, 64])
def test_normal_numbers_are_those_of_the_plain_form(n: int) -> None:
    drawn = on_gpu.normal(KEYS.to(DEVICE), Stream.POSTERIOR, n)
    torch.testing.assert_close(drawn.cpu(), random.normal(KEYS, Stream.POSTERIOR, n), rtol=1e-5, atol=1e-6)


def test_no_keys_and_no_numbers() -> None:
    assert on_gpu.normal(KEYS[:0].to(DEVICE), Stream.POSTERIOR, 3).shape == (0, 3)
    assert on_gpu.normal(KEYS.to(DEVICE), Stream.POSTERIOR, 0).shape == (5, 0)
