"""Our kernels of keyed dropout against the plain form: the same to the bit, and the mask is not stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgen.nn import random
from bgen.nn.gpu import dropout as on_gpu
from bgen.nn.random import Stream
from bgen.nn.residual import ResidualBlock, keyed_dropout

NEEDED = ("triton",)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEYS = torch.tensor([0, -1, 2**63 - 1, -(2**63), 7919])


@pytest.fixture(autouse=True)
def on_kernels(kernels_run_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "usable", lambda tensor: True)
    monkeypatch.setattr(on_gpu._kernels(), "FOURS", 8)  # a program shall not have all places


@pytest.mark.parametrize(("width", "keep"), [(1, 0.5), (70, 0.9), (33, 1.0)])
def test_masks_are_those_of_the_plain_form(width: int, keep: float) -> None:
    mask = on_gpu.keep_mask(KEYS.to(DEVICE), Stream.RESIDUAL, width, keep)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), random.keep_mask(KEYS, Stream.RESIDUAL, width, keep))


def test_bits_that_are_the_threshold_are_dropped() -> None:
    first = random.random_bits(KEYS, Stream.RESIDUAL, 1).view(torch.int16)[:, 0]
    for key, bits in zip(KEYS, first.tolist(), strict=True):
        for more, kept in ((0, False), (1, True)):
            mask = on_gpu.keep_mask(key[None].to(DEVICE), Stream.RESIDUAL, 1, (bits + more + 32768) / 65536)
            assert bool(mask) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 70])
def test_values_and_gradients_are_the_same_to_the_bit(width: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(width)
    x, weight = (torch.randn(len(KEYS), width, generator=g).to(dtype) for _ in range(2))
    x[0, 0], x[1, 0] = float("inf"), -0.0
    plain = x.clone().requires_grad_()
    kept = random.keep_mask(KEYS, Stream.DROPOUT + 3, width, 1 - 0.3)
    expected = plain * kept.to(dtype).div_(1 - 0.3)
    expected.backward(weight)
    mine = x.to(DEVICE).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = keyed_dropout(mine, KEYS.to(DEVICE), 3, 0.3)
    found.backward(weight.to(DEVICE))
    assert mine.grad is not None
    assert plain.grad is not None
    assert torch.equal(bits(found), bits(expected))
    assert torch.equal(bits(mine.grad), bits(plain.grad))
    assert [t.shape for t in saved] == [KEYS.shape]


def bits(x: Tensor) -> Tensor:
    """A tensor's bits, in which -0 is not 0; every NaN is one."""
    x = x.detach().cpu()
    return x.masked_fill(x.isnan(), float("nan")).view(torch.int16 if x.dtype == torch.float16 else torch.int32)


def test_they_are_operators_that_can_be_traced() -> None:
    checks = ("test_schema", "test_faketensor")
    keys = KEYS.to(DEVICE)
    torch.library.opcheck(torch.ops.bgen.keep_mask, (keys, 3, 9, 0.5), test_utils=checks)
    x = torch.ones(len(keys), 9, device=DEVICE)
    torch.library.opcheck(torch.ops.bgen.keyed_dropout, (x, keys, 3, 0.5), test_utils=checks)


def test_a_block_with_it_is_compiled_whole() -> None:
    torch.manual_seed(0)
    block, keys = ResidualBlock(9, 0.5, 2).to(DEVICE), KEYS.to(DEVICE)
    given = torch.randn(2, len(keys), 9, device=DEVICE)
    found = []
    for call in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        x = given[0].clone().requires_grad_()
        y = call(x, keys)
        y.backward(given[1])
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0])
