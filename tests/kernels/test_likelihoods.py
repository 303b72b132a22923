"""Our kernels of the likelihoods against the textbook formula in float64: values, gradients, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bgen.data.batch import CellBatch
from bgen.models.likelihoods import fused
from bgen.models.likelihoods.negative_binomial import NegativeBinomial, ZeroInflatedNegativeBinomial

NEEDED = ("triton",)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def on_kernels(kernels_run_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "usable", lambda logits: logits.dtype != torch.float64)
    kernels = fused._kernels()
    monkeypatch.setattr(kernels, "CELLS", 2)  # the interpreter is slow, and a program shall not have all cells


def batch_of(dense: Tensor) -> CellBatch:
    rows, genes = dense.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)))
    numbers = torch.arange(len(dense))
    tensors = (t.to(DEVICE) for t in (indptr, genes.int(), dense[rows, genes]))
    return CellBatch(*tensors, dense.shape[1], numbers, numbers)


def made(B: int, G: int, inflated: bool) -> tuple[Tensor, list[Tensor]]:
    """Counts, among them a cell without any and one that is large; logits, and dispersions from nearly none to Poisson;
    if asked for, log-odds of zeros.
    """
    g = torch.Generator().manual_seed(B * G)
    counts = torch.poisson(torch.rand(B, G, generator=g) * 2, generator=g) * (torch.rand(B, G, generator=g) < 0.3)
    counts[0, 0], counts[0, G - 1] = 3000.0, 1.0
    if B > 1:
        counts[1] = 0
    tensors = [torch.randn(B, G, generator=g) * 2, torch.linspace(-8, 13, G)]
    return counts, [*tensors, torch.randn(B, G, generator=g) * 2] if inflated else tensors


def of(tensors: list[Tensor], counts: Tensor) -> NegativeBinomial:
    logits, log_theta, *dropout = tensors
    kind: Callable[..., NegativeBinomial] = ZeroInflatedNegativeBinomial if dropout else NegativeBinomial
    return kind(logits, counts.sum(1).to(logits.device), log_theta, *dropout)


def error(found: Tensor, exact: Tensor) -> float:
    """Largest error over the largest value."""
    return float((found.detach().cpu().double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("inflated", [False, True])
@pytest.mark.parametrize(("B", "G"), [(1, 1), (3, 70), (5, 1500)])
def test_values_and_gradients_are_those_of_the_textbook(B: int, G: int, inflated: bool) -> None:
    counts, tensors = made(B, G, inflated)
    weight = torch.linspace(-1, 2, B)
    exact = [t.double().requires_grad_() for t in tensors]
    expected = of(exact, counts).log_prob(counts.double()).sum(1)
    (expected * weight.double()).sum().backward()
    single = [t.to(DEVICE).requires_grad_() for t in tensors]
    found = of(single, counts).log_prob_sparse(batch_of(counts))
    (found * weight.to(DEVICE)).sum().backward()
    assert error(found, expected.detach()) < 1e-5
    for mine, reference in zip(single, exact, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        if G > 1:  # of one gene the share is one, whatever its logit
            assert error(mine.grad, reference.grad) < 1e-5


@pytest.mark.parametrize("inflated", [False, True])
def test_logits_in_half_precision_stay_so(inflated: bool) -> None:
    """No matrix of cells by genes is made in float32, and what is computed is that of the rounded logits."""
    counts, tensors = made(5, 1500, inflated)
    logits, log_theta, *dropout = tensors
    rounded = [logits.half(), log_theta, *(d.half() for d in dropout)]
    exact = [t.double().requires_grad_() for t in rounded]
    expected = of(exact, counts).log_prob(counts.double()).sum(1)
    expected.sum().backward()
    given = [t.to(DEVICE).requires_grad_() for t in rounded]
    batch = batch_of(counts)
    with _Made() as seen:
        found = of(given, counts).log_prob_sparse(batch)
        found.sum().backward()
    assert found.dtype == torch.float32
    assert error(found, expected.detach()) < 1e-5
    for mine, reference in zip(given, exact, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert error(mine.grad, reference.grad) < 1e-3  # half precision has 11 bits
    of_matrices = [t for t in seen.dtypes if t[1] >= logits.numel()]
    assert {dtype for dtype, _ in of_matrices} <= {torch.float16}


class _Made(TorchDispatchMode):
    """Dtype and size of every tensor that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.dtypes += [(t.dtype, t.numel()) for t in tree_leaves(out) if isinstance(t, Tensor)]
        return out


@pytest.mark.parametrize("inflated", [False, True])
def test_they_are_operators_that_can_be_traced(inflated: bool) -> None:
    counts, tensors = made(3, 70, inflated)
    logits, log_theta, *dropout = (t.to(DEVICE) for t in tensors)
    batch = batch_of(counts)
    common = (dropout[0] if inflated else None, log_theta, counts.sum(1).clamp_min(1e-6).to(DEVICE))
    given = (logits, *common, batch.indptr, batch.indices, batch.counts)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bgen.log_prob, given, test_utils=checks)
    vectors = (torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE))
    torch.library.opcheck(torch.ops.bgen.log_prob_gradients, (*vectors, *given), test_utils=checks)
