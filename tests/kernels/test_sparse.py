"""Our kernels of sparse products against dense ones in float64: the first layer, and what tokens read of genes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.models.vae import sparse_linear
from bgen.models.vae.set_read import SetRead
from bgen.models.vae.sparse_linear import densify, log_normalise, log_normalised_matmul, sparse_matmul
from bgen.nn.gpu import sparse as on_gpu

NEEDED = ("triton",)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def on_kernels(kernels_run_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "usable", lambda weight: weight.dtype != torch.float64)
    for name, size in {"CELLS": 16, "GENES": 16, "WIDTH": 64}.items():  # a program shall not have all of them
        monkeypatch.setattr(on_gpu._kernels(), name, size)


def made(B: int, G: int) -> CellBatch:
    """Counts, among them a cell without any, one of all genes of some tiles, and a large one."""
    g = torch.Generator().manual_seed(B * G)
    counts = torch.poisson(torch.rand(B, G, generator=g) * 2, generator=g) * (torch.rand(B, G, generator=g) < 0.2)
    counts[0, :20] = 1.0
    counts[0, G - 1] = 3000.0
    if B > 1:
        counts[1] = 0
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (counts > 0).sum(1).cumsum(0)))
    given = indptr, counts.nonzero()[:, 1].int(), counts[counts > 0]
    return CellBatch(*given, G, torch.arange(B), torch.arange(B)).to(DEVICE)


def exactly(batch: CellBatch, values: Tensor) -> Tensor:
    shape = len(batch), batch.n_genes
    return densify(batch.rows, batch.indices, values.double(), shape).cpu()


def error(found: Tensor, exact: Tensor) -> float:
    """Largest error over the largest value."""
    return float((found.detach().cpu().double() - exact.detach()).abs().max() / exact.detach().abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("B", "G", "H"), [(1, 150, 1), (19, 70, 69)])
def test_values_and_gradients(B: int, G: int, H: int, normalised: bool, dtype: torch.dtype, bound: float) -> None:
    batch = made(B, G)
    g = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(n, H, generator=g).to(dtype) for n in (G, B))
    counts = batch.counts / (1.0 if normalised else 1000.0)
    values = log_normalise(batch, counts.double(), 1e4) if normalised else counts
    exact = weight.double().requires_grad_()
    expected = exactly(batch, values.to(dtype)) @ exact  # tensor cores multiply values in the weight's precision
    expected.backward(grad.double())
    mine = weight.to(DEVICE).requires_grad_()
    found = log_normalised_matmul(mine, batch, counts, 1e4) if normalised else sparse_matmul(mine, batch, counts)
    found.backward(grad.to(DEVICE))
    assert (found.dtype, found.shape) == (dtype, (B, H))
    assert mine.grad is not None
    assert exact.grad is not None
    assert error(found, expected) < bound
    assert error(mine.grad, exact.grad) < bound


def test_dense_counts_are_multiplied_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nearly all is stored there is nothing to save."""
    monkeypatch.setattr(sparse_linear, "sparse_product", None)
    batch, weight = made(1, 22), torch.ones(22, 3, device=DEVICE)
    assert (
        error(sparse_matmul(weight, batch, batch.counts), exactly(batch, batch.counts) @ torch.ones(22, 3).double())
        < 1e-6
    )


def test_what_tokens_read_of_a_set_of_genes() -> None:
    """Values, gradients of every weight and of the genes' rows; known tokens with factors and signs."""
    B, G, M, S = 5, 70, 3, 1
    torch.manual_seed(0)
    batch = made(B, G)
    read = SetRead(4, M, 6, 2, values=True, attention=True)
    g = torch.Generator().manual_seed(1)
    given = [torch.randn(G, 4, generator=g), torch.rand(G, M, generator=g)]
    sign = torch.randn(G, S, generator=g)
    log = log_normalise(batch, batch.counts, 1e4).cpu()
    results = []
    for dtype, device in ((torch.float64, torch.device("cpu")), (torch.float32, DEVICE)):
        of = copy.deepcopy(read).to(device, dtype)
        rows, factor = (t.to(device, dtype).requires_grad_() for t in given)
        here, values = batch.to(device), log.to(device, dtype)
        outputs = of(rows, here, values, values, factor, sign.to(device, dtype))
        sum((y.double() ** 2).sum() for y in outputs[:2]).backward()
        results.append([*outputs, *(p.grad for p in (rows, factor, *of.parameters()))])
    for exact, found in zip(*results, strict=True):
        assert error(found, exact) < 1e-5


def test_they_are_operators_that_can_be_traced() -> None:
    batch = made(3, 60)
    for factor in (None, torch.ones(3, device=DEVICE)):
        entries = batch.indptr, batch.indices, batch.counts, factor
        weight, grad = torch.ones(60, 5, device=DEVICE), torch.ones(3, 5, device=DEVICE)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.bgen.sparse_product, (weight, *entries), test_utils=checks)
        torch.library.opcheck(torch.ops.bgen.sparse_product_gradient, (grad, *entries, 60), test_utils=checks)
