"""The operations of a training step, by formula, against what torch counts as it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bgen.config.backbone import BackboneConfig
from bgen.config.flow import CouplingConfig, FlowConfig, PatternsConfig
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.flow.plans import Plans
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE
from bgen.nn.scans import ssd, ssd_torch

B, T, N, G, NONZEROS = 2, 3, 4, 30, 5


@pytest.fixture(autouse=True)
def products_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the scan is a compiled loop, which the counter does not see; in torch it is the same products."""
    monkeypatch.setattr(ssd, "ssd_cpu", ssd_torch)


def cells() -> CellBatch:
    n = B * T * N
    return CellBatch(
        torch.arange(n + 1) * NONZEROS,
        torch.arange(NONZEROS).repeat(n).int(),
        torch.ones(n * NONZEROS),
        G,
        torch.arange(n),
        torch.arange(n),
        obs={"time": torch.arange(n) / n, "batch": torch.arange(n) % 2},
    )


def sparse_product(model: Any, batch: CellBatch) -> int:
    """Operations of the encoder's first layer, which torch cannot see: the product is a compiled loop."""
    hidden = (model if isinstance(model, VAE) else model.vae).config.hidden
    return 2 * len(batch.counts) * hidden


def count(model: Any, batch: CellBatch) -> int:
    """Forward operations as torch counts them, and those of the sparse product."""
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch)
    return counter.get_total_flops() + sparse_product(model, batch)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_vae(likelihood: Any) -> None:
    config = VAEConfig(latent=3, hidden=16, blocks=2, likelihood=likelihood)
    model, batch = VAE(config, G, {"batch": 2}), cells()
    with FlopCounterMode(display=False) as counter:
        model(batch)["loss"].sum().backward()
    # The sparse product is done forward, and once more for the gradient of the weights; counts need none.
    assert model.training_flops(batch) == counter.get_total_flops() + 2 * sparse_product(model, batch)
    forward = model.latents_flops(len(batch), len(batch.counts)) + model.decoder.flops(len(batch))
    assert forward == count(model, batch)


@pytest.mark.parametrize("name", ["mlp", "hybrid"])
@pytest.mark.parametrize("trajectories", [False, True])
def test_flow(name: str, trajectories: bool) -> None:
    vae = VAE(VAEConfig(latent=3, hidden=16, blocks=1), G, {})
    backbone = BackboneConfig.model_validate({"name": name, "width": 32, "layers": 1, "mamba2": {"head_width": 16}})
    model = LatentFlow(FlowConfig(backbone=backbone), vae, {"batch": 2}, {"time": (0.0, 1.0)})
    batch = cells()
    if trajectories:
        mask, time = torch.ones(B, T, N, dtype=torch.bool), torch.arange(T).float().expand(B, T)
        batch = TrajectoryBatch.of(batch, mask, time, torch.zeros(B, T, dtype=torch.bool))
    # The encoder is not trained: it runs forward only.
    encoder = vae.latents_flops(len(batch), len(batch.counts))
    assert model.training_flops(batch) == 3 * count(model, batch) - 2 * encoder


def test_flow_that_learns_growth() -> None:
    vae = VAE(VAEConfig(latent=3, hidden=16, blocks=1), G, {})
    backbone = BackboneConfig.model_validate({"name": "mlp", "width": 32, "layers": 1})
    patterns = PatternsConfig(noise=0, forecast=1, interpolate=0, perturb=0)
    coupling = CouplingConfig(cells=5, growth=True)
    config = FlowConfig(backbone=backbone, patterns=patterns, source="neighbours", coupling=coupling)
    model = LatentFlow(config, vae, {"batch": 2}, {"time": (0.0, 1.0)})
    references = np.random.default_rng(0).normal(size=(5 * B * T, vae.size)).astype(np.float32)
    model.plans = Plans(references, 5 * np.arange(B * T + 1), 0.1)
    mask, time = torch.ones(B, T, N, dtype=torch.bool), torch.arange(T).float().expand(B, T)
    population = torch.arange(B * T).view(B, T)
    batch = TrajectoryBatch.of(cells(), mask, time, torch.zeros(B, T, dtype=torch.bool), population=population)
    encoder = vae.latents_flops(len(batch), len(batch.counts))
    assert model.training_flops(batch) == 3 * count(model, batch) - 2 * encoder
