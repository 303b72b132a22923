from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgen.nn import sparse_linear
from bgen.nn.sparse_linear import densify, sparse_matmul


def csr(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (x != 0).sum(dim=1).cumsum(0)))
    return indptr, columns.int(), x[rows, columns], rows


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_product_and_gradient_are_those_of_the_dense_product(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_linear, "SPARSE_SHARE", share)
    torch.manual_seed(0)
    x = torch.randn(6, 20) * (torch.rand(6, 20) < 0.2)
    x[2] = 0
    weight = torch.randn(20, 5, requires_grad=True)
    target = torch.randn(6, 5)
    indptr, indices, values, rows = csr(x)
    assert torch.equal(densify(rows, indices, values, (6, 20)), x)
    product = sparse_matmul(weight, indptr, indices, values, rows)
    torch.testing.assert_close(product, x @ weight)
    (gradient,) = torch.autograd.grad((product * target).sum(), weight)
    torch.testing.assert_close(gradient, x.T @ target)
