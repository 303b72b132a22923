"""Where Triton is there, the likelihoods are one operator in each pass, of logits in the precision of the decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import B, G, cells, vae
from on_cuda import CUDA, Trace

from bgen.models.likelihoods import fused


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_a_step_is_traced_with_the_kernels(likelihood: str, cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, list[Any]] = {"_log_prob": [], "_gradients": []}
    for name, seen in given.items():
        operator = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, of=operator, to=seen: to.append(a) or of(*a))
    monkeypatch.setattr("bgen.nn.gpu.kernels.HAVE_TRITON", True)
    trace = Trace()
    module = trace.module(vae(likelihood=likelihood, thinning=0.0).train())
    batch = trace.on_host(cells())
    with trace():
        loss = module(batch.to(CUDA))["loss"].mean()
    trace.backward(loss)
    ((logits, dropout, *_),) = given["_log_prob"]
    assert (logits.dtype, logits.shape) == (torch.bfloat16, (B, G))
    assert (dropout is None) == (likelihood == "nb")
    assert len(given["_gradients"]) == 1
    assert [parameter.shape for parameter in module.parameters() if parameter.grad is None] == []


def test_double_precision_has_no_kernels(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgen.nn.gpu.kernels.HAVE_TRITON", True)
    trace = Trace()
    assert fused.usable(trace.tensor(torch.ones(2, 3)))
    assert not fused.usable(trace.tensor(torch.ones(2, 3).double()))
    assert not fused.usable(torch.ones(2, 3))
