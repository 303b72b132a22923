"""What runs on a GPU in a step of training, traced for CUDA: nothing waits for it, and nothing is on the CPU."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import EACH, SETS, B, G, along_time, annotator, cells, course, flow, vae
from on_cuda import CUDA, REFUSED, OnCPUError, Trace, WaitError
from torch import nn
from waits import ALLOWED

from bgen.config.flow import LogCountsConfig
from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.errors import UserError
from bgen.models.log_counts import LogCounts
from bgen.train.diagnose.norms import LayerNorms
from bgen.train.engine.ema import EMA
from bgen.train.engine.parameter_groups import parameter_groups
from bgen.train.step_losses import StepLosses

KNOWN = {
    "name": "gene_set",
    "values": True,
    "token_blocks": 1,
    "vectors": {"size": 4},
    "groups": {"tokens": 2, "hierarchy": True},
    "network": {"tokens": 2, "relations": True},
}

MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], CellBatch]]] = {
    "nb": (vae, cells),
    "zinb": (lambda: vae(likelihood="zinb", thinning=0.0, panel={"share": 0.5}), cells),
    "recomputed": (lambda: vae(recompute=True, thinning=0.0, free_bits=0.1), cells),
    "gene set": (lambda: vae(thinning=0.0, encoder=KNOWN), cells),
    "hard sets": (
        lambda: vae(thinning=0.0, encoder={"name": "gene_set", "groups": {"tokens": 2, "bias": "hard"}}),
        cells,
    ),
    "ranked": (lambda: vae(thinning=0.0, encoder={"name": "ranked", "genes": 8}), cells),
    "gene table": (lambda: vae(thinning=0.0, decoder={"name": "gene_table", "vectors": {"size": 4}}), cells),
    "annotator": (annotator, cells),
    "static mlp": (lambda: flow({"name": "mlp"}, t_sampling="stratified"), cells),
    "log counts": (lambda: flow({"name": "mlp"}, codec=LogCounts(LogCountsConfig(), G), t_sampling="uniform"), cells),
    "tokens": (lambda: flow({"name": "hybrid", "pattern": ["tokens", "time"], "tokens": {"count": 2}}), course),
    "transformer": (lambda: flow({"name": "transformer"}, prediction="data", endpoint=0.1), course),
    "set transformer": (
        lambda: flow({"name": "set_transformer", "cells": {"mixer": "set_attention", "inducing": 2}}),
        lambda: course(known=True),
    ),
    "tracked": (lambda: flow({"name": "ssm", "time": {"tracked": True}}, t_sampling="logit_normal"), course),
    "mamba2": (lambda: along_time("mamba2", recompute=True), course),
    "mamba1": (lambda: along_time("mamba1"), course),
    "s4d": (lambda: along_time("s4d"), course),
    "hyena": (lambda: along_time("hyena"), course),
    "attention": (lambda: along_time("attention"), course),
    "perturbation": (
        lambda: flow({"name": "mlp"}, SETS, source="neighbours", condition_dropout_each=0.1),
        lambda: course(known=True),
    ),
}
"""By name: a module as a stage trains it, and a batch of it."""


@pytest.mark.parametrize("name", MODULES)
def test_both_passes_and_the_update_are_traced(name: str, cuda: None) -> None:
    trace, (make, batch) = Trace(), MODULES[name]
    module = trace.module(make().train())
    given = trace.on_host(batch())
    losses, norms = StepLosses(), LayerNorms(module, every=1)
    norms.begin(1)
    with trace() as watch:
        with norms.forward():
            found = module(given.to(CUDA))
        loss = found["loss"].float().mean()
        good = found["loss"].detach().isfinite()
        losses.add(found)
        loss = loss * torch.where(good.all(), 1.0, float("nan"))
    assert all(values.dtype == torch.float32 and values.shape == (B,) for values in found.values())
    assert torch.bfloat16 in watch.products
    trace.backward(loss)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trained if parameter.grad is None] == []
    with trace(autocast=False) as watch:
        norms.backward(lambda: ((name, p.grad) for name, p in module.named_parameters() if p.grad is not None))
        torch.optim.AdamW(parameter_groups(module, 0.1), lr=1e-3, fused=True).step()
        weights = {(str(number), 0): parameter.detach().flatten() for number, parameter in enumerate(trained)}
        average = EMA(weights, 0.999)
        average.update(weights, 1)
        losses.close(B, 1e-3, 1.0, applied=True)
    assert {piece.device for piece in average.pieces.values()} == {CUDA}


def test_the_record_takes_all_its_steps_in_one_copy(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, losses = Trace(), StepLosses()
    values = SimpleNamespace(tolist=lambda: [[B, 2 * B]] * 10)  # a trace has none
    monkeypatch.setattr("bgen.distributed.world.all_sum", lambda _: values)
    with trace(autocast=False) as watch:
        for _ in range(10):
            for _ in range(2):
                losses.add({name: torch.ones(B, device=CUDA) for name in ("loss", "kl")})
            losses.close(2 * B, 1e-3, 1.0, applied=True)
        with watch.taking():
            taken = losses.take()
        assert losses.take() == []
    assert watch.taken == 1
    assert [step.losses for step in taken] == [{"kl": 0.5, "loss": 1.0}] * 10


def test_a_packed_batch_is_unpacked_on_the_device(cuda: None) -> None:
    trace, zero = Trace(), torch.zeros(B, dtype=torch.int64)
    ends = torch.arange(B + 1) * EACH
    packed = PackedBatch(
        gaps=torch.zeros(B * EACH + 3, dtype=torch.uint8),
        counts=torch.zeros(B * EACH, dtype=torch.uint8),
        overflow=torch.zeros(5, dtype=torch.int32),
        gap_start=ends,
        indptr=ends,
        n_genes=G,
        keys=zero,
        cells=zero,
        obs={"batch": zero},
    )
    on_host = PackedBatch(**{name: trace.on_host(value) for name, value in vars(packed).items()})
    with trace(autocast=False):
        batch = on_host.to(CUDA).to_csr()
        dense = on_host.to(CUDA).densify()
        rows = batch.rows
    assert (batch.indices.dtype, batch.counts.dtype, dense.shape) == (torch.int32, torch.float32, (B, G))
    assert {batch.indices.device, batch.counts.device, batch.obs["batch"].device, rows.device} == {CUDA}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, here: x.sum().item(),
        lambda x, here: bool((x > 0).all()),
        lambda x, here: x.tolist(),
        lambda x, here: x[x > 0],
        lambda x, here: x.nonzero(),
        lambda x, here: torch.repeat_interleave(x.long()),
        lambda x, here: x.cpu(),
        lambda x, here: here.to(CUDA),
        lambda x, here: torch.tensor([1.0, 2.0], device=CUDA),
        lambda x, here: x + here,
        lambda x, here: x[torch.arange(2)],
        lambda x, here: x.copy_(here),
    ],
)
def test_what_waits_or_is_on_the_cpu_is_refused(wrong: Callable[[Any, Any], Any], cuda: None) -> None:
    trace = Trace()
    x, here = trace.tensor(torch.ones(3)), trace.on_host(torch.ones(3))
    with trace(), pytest.raises((*REFUSED, RuntimeError)) as raised:
        wrong(x, here)
    assert isinstance(raised.value, REFUSED) or "same device" in str(raised.value)


def test_what_does_not_wait_passes(cuda: None) -> None:
    trace = Trace()
    x, here = trace.tensor(torch.ones(3)), trace.on_host(torch.ones(3))
    with trace():
        x[0] = 1.0
        found = x + torch.tensor(2.0) + here.to(CUDA, non_blocking=True) + torch.where(x > 0, 1.0, 0.0)
    assert found.device == CUDA
    assert issubclass(OnCPUError, Exception)
    assert issubclass(WaitError, Exception)


def test_times_are_looked_at_before_the_batch_leaves_the_cpu() -> None:
    """On the device nobody asks: it would have to be waited for."""
    model, batch = along_time("mamba2"), course()
    model.check_batch(batch)
    batch.time = batch.time.flip(1)
    with pytest.raises(UserError, match="times must ascend"):
        model.check_batch(batch)
    with pytest.raises(UserError, match="times must ascend"):
        model(batch)


def test_every_wait_that_is_allowed_has_a_place_and_a_reason() -> None:
    for allowed in ALLOWED:
        assert callable(pkgutil.resolve_name(allowed.place)), allowed.place
        assert len(allowed.reason) > 40, allowed.place
