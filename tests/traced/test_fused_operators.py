"""Where Triton is there, what is random and what is sparse are operators, too, and no mask is kept for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import EACH, B, G, cells, vae
from on_cuda import CUDA, Trace

from bgen.models.vae.vae import VAE
from bgen.nn.gpu import dropout, sparse, thinning
from bgen.nn.random import Stream


@pytest.fixture
def triton(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgen.nn.gpu.kernels.HAVE_TRITON", True)


def watched(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> dict[str, list[Any]]:
    """What operators of a module are given, by name."""
    given: dict[str, list[Any]] = {name: [] for name in names}
    for name, seen in given.items():
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, of=operator, to=seen: to.append(a) or of(*a))
    return given


def step(model: VAE) -> None:
    """Trace both passes of a step."""
    trace = Trace()
    module = trace.module(model.train())
    batch = trace.on_host(cells())
    with trace():
        loss = module(batch.to(CUDA))["loss"].mean()
    trace.backward(loss)
    assert [parameter.shape for parameter in module.parameters() if parameter.grad is None] == []


def test_dropout_is_an_operator_in_both_passes(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = watched(monkeypatch, dropout, "_keyed_dropout", "_keep_mask")
    decoder = {"name": "gene_table", "vectors": {"size": 4, "residual_dropout": 0.3}}
    model = vae(thinning=0.0, dropout=0.1, decoder=decoder)
    layers = sum(hasattr(part, "dropout") and hasattr(part, "number") for part in model.modules())
    step(model)
    assert len(given["_keyed_dropout"]) == 2 * layers > 0
    assert {x.dtype for x, *_ in given["_keyed_dropout"]} == {torch.bfloat16}
    ((keys, stream, places, keep),) = given["_keep_mask"]
    assert (len(keys), stream, places, keep) == (B, Stream.RESIDUAL, G, 0.7)


def test_thinning_is_an_operator(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = watched(monkeypatch, thinning, "_thin")
    step(vae(thinning=0.5))
    ((_, _, counts, keys, keep, stream),) = given["_thin"]
    assert (counts.shape, keys.shape, keep.shape, stream) == ((B * EACH,), (B,), (B,), Stream.THIN_COUNT)
    assert keep.dtype == torch.float32


def test_the_first_layer_is_an_operator_of_counts(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = watched(monkeypatch, sparse, "_product", "_gradient")
    step(vae(thinning=0.5))
    ((weight, _, indices, counts, factor),) = given["_product"]
    assert (weight.dtype, weight.shape, indices.dtype) == (torch.bfloat16, (G, 16), torch.int32)
    assert (counts.dtype, counts.shape, factor.shape) == (torch.float32, (B * EACH,), (B,))
    ((grad, *_, genes),) = given["_gradient"]
    assert (grad.dtype, grad.shape, genes) == (torch.bfloat16, (B, 16), G)


def test_what_tokens_read_is_an_operator(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = watched(monkeypatch, sparse, "_product", "_gradient")
    step(vae(thinning=0.0, encoder={"name": "gene_set", "values": True, "network": {"tokens": 2}}))
    assert len(given["_product"]) == len(given["_gradient"]) == 2  # tables of weights, and of what values add
    assert {(weight.dtype, factor) for weight, *_, factor in given["_product"]} == {(torch.bfloat16, None)}
