"""The flow from control to perturbed cells: what is forgotten in training, so that unseen targets can be asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgen.config.perturb import PerturbConfig
from bgen.config.vae import VAEConfig
from bgen.models.generators.perturbation_flow import PairBatch, PerturbationFlow, PerturbationSet
from bgen.models.vae.vae import VAE

GENES, B = 12, 64


def test_what_is_forgotten_are_targets_among_the_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drugs keep their own vectors: nothing else tells them apart."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent=2, hidden=8), GENES, {})
    flow = PerturbationFlow(
        PerturbConfig(forget=0.5), vae, 2, torch.randn(GENES, 3), 1.0, torch.zeros(2, GENES)
    ).train()
    gene = torch.tensor([[3, -1]]).expand(B, 2)
    batch = PairBatch(
        indptr=torch.zeros(B + 1, dtype=torch.int64),
        indices=torch.zeros(0, dtype=torch.int32),
        counts=torch.zeros(0),
        n_genes=GENES,
        keys=torch.arange(B),
        cells=torch.arange(B),
        perturbed=torch.randn(B, 3),
        control=torch.randn(B, 3),
        known=torch.tensor([[0, 1]]).expand(B, 2),
        gene=gene,
        dose=torch.full((B, 2), torch.nan),
        there=torch.ones(B, 2),
    )
    seen: list[PerturbationSet] = []

    def velocity(z: Tensor, t: Tensor, sets: PerturbationSet) -> Tensor:
        seen.append(sets)
        return torch.zeros_like(z)

    monkeypatch.setattr(flow, "velocity", velocity)
    flow(batch)
    target, drug = seen[0].known.unbind(1)
    assert 0.2 < (target == -1).float().mean() < 0.8
    assert (drug == 1).all()
    flow.eval()(batch)
    assert (seen[1].known == batch.known).all()
