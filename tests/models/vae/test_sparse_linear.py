from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.models.vae import sparse_linear
from bgen.models.vae.sparse_linear import densify, log_normalise, sparse_matmul


def csr(x: Tensor) -> CellBatch:
    rows, columns = x.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (x != 0).sum(dim=1).cumsum(0)))
    ids = torch.arange(len(x))
    return CellBatch(indptr, columns.int(), x[rows, columns], x.shape[1], keys=ids, cells=ids)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_product_and_gradient_are_those_of_the_dense_product(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "SPARSE_SHARE", share)
    torch.manual_seed(0)
    x = torch.randn(6, 20) * (torch.rand(6, 20) < 0.2)
    x[2] = 0
    weight = torch.randn(20, 5, requires_grad=True)
    target = torch.randn(6, 5)
    batch = csr(x)
    assert torch.equal(densify(batch.rows, batch.indices, batch.counts, (6, 20)), x)
    product = sparse_matmul(weight, batch, batch.counts)
    torch.testing.assert_close(product, x @ weight)
    (gradient,) = torch.autograd.grad((product * target).sum(), weight)
    torch.testing.assert_close(gradient, x.T @ target)


@pytest.mark.parametrize("threads", [1, 2])
def test_log_normalised_counts(threads: int) -> None:
    torch.manual_seed(0)
    dense = torch.poisson(torch.rand(300, 500) * 2) * torch.logspace(0, 4, 500).round()
    dense[17] = 0
    batch = csr(dense)
    exact = torch.log1p(1e4 * dense.double() / dense.double().sum(1, keepdim=True).clamp_min(1))[dense > 0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = log_normalise(batch, batch.counts, 1e4)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), exact, rtol=4e-7, atol=0)
    torch.testing.assert_close(log_normalise(batch, batch.counts.double(), 1e4), exact, rtol=1e-12, atol=0)
