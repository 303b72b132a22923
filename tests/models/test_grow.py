"""Grown models: what was known is unchanged, and a new gene starts at its share."""

from __future__ import annotations

import torch

from bgen.config.flow import FlowConfig
from bgen.config.vae import VAEConfig
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.grow import grow_flow, grow_vae
from bgen.models.vae.vae import VAE


def make() -> VAE:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=3, hidden=16, blocks=1), 20, {"batch": 2}).eval()
    with torch.no_grad():
        for table in vae.decoder.covariates.tables:
            table.table.weight[1:] = torch.randn(2, 16)
    return vae


def test_old_batches_and_genes_decode_as_before() -> None:
    vae = make()
    z, library = torch.randn(4, 3), torch.full((4,), 100.0)
    old = vae.decode(z, library, {"batch": torch.tensor([0, 1, -1, 0])}).mean
    more = grow_vae(vae, {"batch": 5})
    torch.testing.assert_close(more.decode(z, library, {"batch": torch.tensor([0, 1, -1, 0])}).mean, old)
    unknown = vae.decode(z, library, {"batch": torch.full((4,), -1)}).mean
    torch.testing.assert_close(more.decode(z, library, {"batch": torch.full((4,), 4)}).mean, unknown)


def test_new_genes_start_at_their_share() -> None:
    vae = make()
    with torch.no_grad():
        vae.decoder.logits.weight.zero_()
    grown = grow_vae(vae, {"batch": 2}, torch.tensor([0.2, 0.05]))
    mean = grown.decode(torch.randn(4, 3), torch.full((4,), 125.0), {}).mean
    torch.testing.assert_close(mean[:, 20:], torch.tensor([[20.0, 5.0]]).expand(4, 2), rtol=1e-4, atol=1e-4)


def test_a_new_condition_starts_like_an_unknown_one() -> None:
    vae = make()
    flow = LatentFlow(FlowConfig(conditions=["kind"]), vae, {"kind": 2}, {"time": (3.0, 2.0)}).eval()
    grown = grow_flow(flow, grow_vae(vae, {"batch": 2}), {"kind": 3})
    hidden = torch.zeros(1, dtype=torch.bool)
    now = torch.tensor([4.0])
    for old, new in ((0, 0), (1, 1), (-1, -1), (-1, 2)):
        torch.testing.assert_close(
            flow.conditions({"kind": torch.tensor([old]), "time": now}, hidden),
            grown.conditions({"kind": torch.tensor([new]), "time": now}, hidden),
        )
