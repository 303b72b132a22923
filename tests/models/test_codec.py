"""Flows know of the model between counts and latents what a codec says, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from bgen.config.flow import FlowConfig, MemberSizes, SampleConfig
from bgen.data.batch import CellBatch
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.errors import UserError
from bgen.models.codec import Codec, log_library
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.models.likelihoods.negative_binomial import NegativeBinomial
from bgen.models.measured_latents import MeasuredLatents
from bgen.models.vae.sparse_linear import densify

G = 5


class LogShares(Codec):
    """log(1 + 100 share) of every gene: no parameters, nothing learnt."""

    def __init__(self) -> None:
        super().__init__(G, G, {})
        self.latent_std.fill_(2.0)

    def latents(self, batch: CellBatch) -> Tensor:
        counts = densify(batch.rows, batch.indices, batch.counts, (len(batch), G))
        return self.whiten(torch.log1p(100 * counts / counts.sum(1, keepdim=True)), log_library(batch))

    def decode(
        self, z: Tensor, library: Tensor, covariates: Mapping[str, Tensor], keys: Tensor | None = None
    ) -> NegativeBinomial:
        return NegativeBinomial(z.expm1().clamp_min(1e-3).log(), library, torch.zeros(G))

    def latents_flops(self, cells: int, nonzeros: int) -> int:
        return 0


def cells(n: int = 6) -> CellBatch:
    counts = torch.poisson(torch.full((n, G), 3.0), generator=torch.Generator().manual_seed(0)) + 1
    numbers = torch.arange(n)
    return CellBatch(
        torch.arange(n + 1) * G, torch.arange(G).repeat(n).int(), counts.flatten(), G, numbers, numbers, obs={}
    )


def test_whitening_is_undone() -> None:
    codec, batch = LogShares(), cells()
    codec.latent_mean.copy_(torch.arange(G + 1.0))
    whitened = codec.latents(batch)
    z, size = codec.unwhiten(whitened)
    torch.testing.assert_close(size, log_library(batch))
    torch.testing.assert_close(codec.whiten_state(z), whitened[:, :-1])
    torch.testing.assert_close(codec.whiten_library(size), whitened[:, -1])
    torch.testing.assert_close(codec.decode(z, size.exp(), {}).mean.sum(1), batch.library)


def test_a_flow_trains_and_generates_on_any_codec() -> None:
    torch.manual_seed(0)
    flow = LatentFlow(FlowConfig(backbone={"width": 16, "layers": 1}), LogShares(), {}, {})
    assert flow.size == G + 1
    batch = cells()
    flow(batch)["loss"].mean().backward()
    assert flow.backbone.head.weight.grad is not None
    assert flow.training_flops(batch) == 3 * (flow.backbone.flops(6, 1, 1) + flow.conditions.flops(6))
    made = flow.sample({}, 4, torch.arange(4), SampleConfig(steps=2), torch.full((4,), 3.0))
    z, size = flow.vae.unwhiten(made)
    torch.testing.assert_close(size, torch.full((4,), 3.0), atol=1e-4, rtol=0)
    assert flow.vae.decode(z, size.exp(), {}).sample(torch.arange(4)).shape == (4, G)
    assert {name for name in flow.state_dict() if name.startswith("vae.")} == {
        "vae.latent_mean",
        "vae.latent_std",
        "vae.log_library_range",
    }


def test_perturbed_populations_are_learnt_and_made_on_any_codec() -> None:
    torch.manual_seed(0)
    codec = LogShares()
    sizes = MemberSizes(members=1, labels=2, largest=1, names=0, vector=0, amount=None, forget=0)
    config = FlowConfig(source="neighbours", backbone={"width": 16, "layers": 1}, patterns={"noise": 0})
    flow = LatentFlow(config, codec, {}, {}, {"guide": sizes})
    told = flow.conditions.member_embeddings["guide"]
    told.describe(torch.zeros(0, 0), torch.tensor([[-1], [0]]), torch.full((2, 1), -1), 1.0)
    base = cells(8)
    base.obs = {"guide": torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])}
    grid = torch.ones(2, 2, 2, dtype=torch.bool)
    when = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    batch = TrajectoryBatch.of(base, grid, when, torch.tensor([[True, False], [True, False]]))
    flow(batch)["loss"].mean().backward()
    assert flow.shift.weight.grad is not None
    z = codec.latents(base).view(2, 2, 2, -1)
    observed = torch.tensor([[True, False], [True, False]])
    places = Places(grid, when, observed, z, start=z)
    codes = {"guide": torch.tensor([[0, 1], [0, 1]])}
    made = flow.sample_trajectories(codes, base.keys.view(2, 2, 2), SampleConfig(steps=2), places)
    torch.testing.assert_close(made, z)  # a network that says nothing leaves cells where they start
    with torch.no_grad():
        flow.shift.weight.fill_(0.1)
    moved = flow.sample_trajectories(codes, base.keys.view(2, 2, 2), SampleConfig(steps=2), places)
    assert torch.equal(moved[:, 0], z[:, 0])
    assert not torch.allclose(moved[:, 1], z[:, 1])


def test_measured_latents_are_looked_up_and_not_decoded() -> None:
    table = torch.randn(9, 3)
    flow = LatentFlow(FlowConfig(backbone={"width": 16, "layers": 1}), MeasuredLatents(table), {}, {})
    batch = cells()
    assert torch.equal(flow.vae.latents(batch), table[:6])
    flow(batch)["loss"].mean().backward()
    with pytest.raises(UserError, match="no counts to decode"):
        flow.vae.decode(table, torch.ones(9), {})
