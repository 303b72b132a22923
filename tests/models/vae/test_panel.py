"""Random gene panels: how many genes a cell loses, and that a draw depends on its key and the gene alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.models.annotator import LABEL, Annotator
from bgen.models.vae.panel import lose, on_panels
from bgen.models.vae.vae import VAE
from bgen.nn.random import Stream, uniform

CELLS, GENES = 600, 200


def batch_of(dense: Tensor) -> CellBatch:
    rows, genes = dense.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)))
    keys = torch.arange(len(dense)) * 7919 - 1000
    obs = {LABEL: torch.arange(len(dense)) % 2}
    return CellBatch(indptr, genes.int(), dense[rows, genes], dense.shape[1], keys, keys, obs=obs)


def test_half_of_the_cells_lose_a_uniform_share_of_their_genes() -> None:
    batch = batch_of(torch.full((CELLS, GENES), 3.0))
    left = on_panels(batch, batch.counts, 0.5, 0.8).view(CELLS, GENES)
    assert set(left.unique().tolist()) == {0.0, 3.0}
    lost = (left == 0).float().mean(1)
    changed = lost[lost > 0]
    assert abs(len(changed) / CELLS - 0.5) < 5 * 0.5 / CELLS**0.5
    assert abs(changed.mean() - 0.4) < 5 * 0.8 / 12**0.5 / len(changed) ** 0.5
    assert changed.max() < 0.9
    quarters = torch.histc(changed, 4, 0, 0.8)  # uniform: as many in each
    assert (quarters / len(changed) - 0.25).abs().max() < 0.1
    genes = (left[lost > 0] == 0).float().mean(0)  # no gene is lost more often than others
    assert (genes - 0.4).abs().max() < 5 * 0.5 / len(changed) ** 0.5


def test_a_draw_depends_on_the_key_and_the_gene_alone() -> None:
    dense = torch.full((CELLS, GENES), 3.0)
    batch = batch_of(dense)
    left = on_panels(batch, batch.counts, 0.5, 0.8).view(CELLS, GENES)
    part = batch.take(torch.arange(100, 130))
    assert torch.equal(on_panels(part, part.counts, 0.5, 0.8).view(30, GENES), left[100:130])
    fewer = dense.clone()
    fewer[:, :50] = 0
    others = replace(batch_of(fewer), keys=batch.keys)
    assert torch.equal(on_panels(others, others.counts, 0.5, 0.8).view(CELLS, -1), left[:, 50:])
    assert torch.equal(batch.counts, dense.flatten())


def test_drawing_for_all_entries_loses_the_same_genes() -> None:
    batch = batch_of(torch.ones(60, 40))
    choice = uniform(batch.keys, Stream.PANEL_CELL, 2)
    found = lose(batch, batch.counts, torch.where(choice[:, 0] < 0.5, 0.9 * choice[:, 1], 0.0))
    assert torch.equal(found, on_panels(batch, batch.counts, 0.5, 0.9))
    assert 0.1 < float((found == 0).float().mean()) < 0.4


@pytest.mark.parametrize("encoder", ["state_vector", "gene_set"])
def test_the_encoder_sees_the_panel_in_training_and_the_decoder_explains_all(encoder: str, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    settings = {"latent": 2, "hidden": 8, "blocks": 0, "thinning": 0.0, "panel": {"share": 0.6, "most": 0.9}}
    vae = VAE(VAEConfig.model_validate({**settings, "encoder": {"name": encoder}}), 30, {}).train()
    batch = batch_of(1 + torch.poisson(torch.full((50, 30), 2.0)))
    shown = []
    forward = vae.encoder.forward
    monkeypatch.setattr(vae.encoder, "forward", lambda batch, counts: shown.append(counts) or forward(batch, counts))
    nll = vae(batch)["nll"]
    assert torch.equal(shown[0], on_panels(batch, batch.counts, 0.6, 0.9))
    mean, logvar = forward(batch, shown[0])
    z = vae.posterior_sample(mean, logvar, batch.keys)
    torch.testing.assert_close(nll, -vae.decode(z, batch.library, {}).log_prob_sparse(batch))  # all counts
    vae.eval()(batch)
    assert torch.equal(shown[1], batch.counts)


def test_a_classifier_is_trained_on_panels_as_its_vae_was() -> None:
    def classifier(share: float) -> Annotator:
        torch.manual_seed(0)
        config = VAEConfig.model_validate({"latent": 2, "hidden": 8, "blocks": 0, "panel": {"share": share}})
        annotator = Annotator(VAE(config, 30, {}), torch.ones(2))
        torch.nn.init.normal_(annotator.head.weight)
        return annotator

    batch = batch_of(1 + torch.poisson(torch.full((50, 30), 2.0)))
    with_panels, without = classifier(0.9), classifier(0.0)
    assert not torch.equal(with_panels.train()(batch)["loss"], without.train()(batch)["loss"])
    assert torch.equal(with_panels.eval()(batch)["loss"], without.eval()(batch)["loss"])
