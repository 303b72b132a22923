"""The encoder of ranked genes: which genes stand where, ties, empty cells, and what every component says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bgen.config.load import load_config
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.hub.directory import load_directory
from bgen.models.grow import grow_vae
from bgen.models.vae.encoders.ranked import RankedEncoder
from bgen.models.vae.vae import VAE
from bgen.train.engine.parameter_groups import undecayed

G, K = 30, 6


def cells(dense: Tensor) -> CellBatch:
    rows, genes = dense.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)))
    ids = torch.arange(len(dense))
    return CellBatch(indptr, genes.int(), dense[rows, genes], dense.shape[1], ids, ids, obs={"batch": ids % 2})


def counts(n: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(0)
    dense = torch.poisson(torch.full((n, G), 2.0), generator=g) * (torch.rand(n, G, generator=g) < 0.3)
    dense[3] = 0
    return dense


def vae(**settings: object) -> VAE:
    torch.manual_seed(0)
    encoder = {"name": "ranked", "genes": K, "width": 8, "rows": 5, **settings}
    model = VAE(VAEConfig.model_validate({"latent": 3, "hidden": 16, "blocks": 1, "encoder": encoder}), G, {"batch": 2})
    model.look_at(cells(counts(200)))
    return model.eval()


def sentence(model: VAE, batch: CellBatch, given: Tensor | None = None) -> list[list[int]]:
    assert isinstance(model.encoder, RankedEncoder)
    genes, there = model.encoder.sentence(batch, batch.counts if given is None else given)
    assert (there.int().diff(dim=1) <= 0).all()  # the places that are taken stand first
    return [row[taken].tolist() for row, taken in zip(genes, there, strict=True)]


def test_medians_are_those_of_the_cells_that_express_a_gene() -> None:
    model, dense = vae(), counts(200)
    assert isinstance(model.encoder, RankedEncoder)
    share = dense / dense.sum(1, keepdim=True).clamp_min(1)
    for gene in range(G):
        expected = share[:, gene][dense[:, gene] > 0].median()
        torch.testing.assert_close(model.encoder.median[gene], expected)


def test_genes_stand_by_count_over_median_and_ties_by_number() -> None:
    model, dense = vae(), counts()
    assert isinstance(model.encoder, RankedEncoder)
    ratio = (dense / model.encoder.median).tolist()
    found = sentence(model, cells(dense))
    for row, genes in zip(ratio, found, strict=True):
        expressed = [gene for gene in range(G) if row[gene] > 0]
        assert genes == sorted(expressed, key=lambda gene: (-row[gene], gene))[:K]
    assert found[3] == []
    model.encoder.median.fill_(1.0)
    assert sentence(model, cells(torch.ones(2, G))) == [list(range(K))] * 2  # all counts are 1


def test_a_count_that_was_thinned_away_is_not_read() -> None:
    model, batch = vae(), cells(torch.ones(2, G))
    left = batch.counts.clone()
    left[: G - 2] = 0
    assert sorted(sentence(model, batch, left)[0]) == [G - 2, G - 1]


def test_depth_alone_changes_nothing_and_the_control_has_one_order_for_all_cells() -> None:
    model, dense = vae(), counts()
    assert sentence(model, cells(3 * dense)) == sentence(model, cells(dense))
    control = vae(shuffled=True, genes=G)
    found = sentence(control, cells(dense))
    assert found == sentence(control, cells(dense.clamp_max(1)))
    (whole,) = sentence(control, cells(torch.ones(1, G)))
    assert whole != sorted(whole)
    assert all(genes == [gene for gene in whole if gene in genes] for genes in found)


@pytest.mark.parametrize("training", [True, False])
def test_a_cell_does_not_feel_the_others_of_its_micro_batch(training: bool) -> None:
    model = vae().train(training)
    batch = replace(cells(counts()), step=100)
    whole = model(batch)["loss"]
    parts = [model(batch.take(torch.arange(a, b)))["loss"] for a, b in ((0, 5), (5, 6), (6, 12))]
    assert whole.isfinite().all()
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-5)


def test_empty_places_are_not_seen() -> None:
    model, dense = vae(genes=G), counts()
    more = vae(genes=G + 10)
    state = model.state_dict()
    more.load_state_dict(state | {"encoder.place": torch.cat((state["encoder.place"], torch.randn(10, 8)))})
    torch.testing.assert_close(more.encode(cells(dense)), model.encode(cells(dense)))


def test_what_decays_grows_and_how_much_it_computes() -> None:
    model, batch = vae(), cells(counts())
    names = {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    assert {"encoder.place", "encoder.cell"} <= undecayed(model)
    assert {"encoder.genes.residual", "encoder.embed.weight"} <= names - undecayed(model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.encode(batch)
    assert counter.get_total_flops() == model.latents_flops(12, len(batch.counts))
    grown = grow_vae(model, {"batch": 3}, torch.tensor([0.1]))
    wider = cells(torch.cat((counts(), torch.zeros(12, 1)), 1))
    torch.testing.assert_close(grown.encode(wider), model.encode(batch))
    assert isinstance(grown.encoder, RankedEncoder)
    assert grown.encoder.median[-1] > 0


def test_it_trains_resumes_and_loads(bgen: Any, demo: Any, tmp_path: Any) -> None:
    given = ["train", "demo/vae", f"out={tmp_path / 'run'}", f"data.store={demo.store}"]
    given += ["vae.encoder={name: ranked, genes: 20, width: 16, rows: 8}", "train.global_batch=64"]
    given += ["train.eval_every=4", "track.mlflow=false", "track.progress=false"]
    assert bgen(*given, "train.steps=4").code == 0
    done = bgen(*given, "train.steps=8", "--resume")
    assert done.code == 0, done
    encoder = load_directory(tmp_path / "run" / "model").vae.encoder
    assert isinstance(encoder, RankedEncoder)
    assert not torch.equal(encoder.median, torch.ones(120))
    done = bgen("plan", "vae", "data.store=nowhere", "vae.encoder.name=ranked", "--genes", 500, "--expressed", 50)
    assert done.code == 0, done
    with pytest.raises(UserError, match="width=65 is no multiple of heads=2"):
        load_config("vae", ["vae.encoder={name: ranked, width: 65}"])
