"""The decoder with rows from a gene table: its start, its formula, how it grows, and that it trains and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bgen.config.vae import VAEConfig
from bgen.hub.directory import load_directory
from bgen.models.grow import grow_vae
from bgen.models.vae.decoders.gene_table import GeneTableDecoder
from bgen.models.vae.vae import VAE
from bgen.train.engine.parameter_groups import undecayed

G = 20
QUICK = ["train.steps=12", "train.global_batch=96", "train.eval_every=6", "train.warmup=2", "train.log_every=4"]
QUICK += ["track.mlflow=false", "track.progress=false"]


def vae(name: str = "gene_table", **changes: object) -> VAE:
    torch.manual_seed(0)
    decoder = {"name": name, **({"rows": 6} if name == "gene_table" else {})}
    config = {"latent": 3, "hidden": 16, "blocks": 1, "decoder": decoder, **changes}
    return VAE(VAEConfig.model_validate(config), G, {"batch": 2}).eval()


def trained(**changes: object) -> VAE:
    model = vae(**changes)
    assert isinstance(model.decoder, GeneTableDecoder)
    torch.nn.init.normal_(model.decoder.ask.weight)
    return model


def test_it_starts_as_the_state_vector_does() -> None:
    ours, other = vae(), vae("state_vector")
    ours.decoder.load_state_dict(other.decoder.state_dict(), strict=False)
    z, library = torch.randn(4, 3), torch.full((4,), 100.0)
    assert torch.equal(ours.decode(z, library, {}).mean, other.decode(z, library, {}).mean)


def test_a_row_is_that_of_the_gene_and_a_map_of_the_table() -> None:
    model = trained(likelihood="zinb")
    decoder = model.decoder
    assert isinstance(decoder, GeneTableDecoder)
    hidden = torch.randn(5, 16)
    rows = decoder.logits.weight + decoder.genes() @ decoder.ask.weight
    expected = hidden @ rows.T + decoder.logits.bias
    torch.testing.assert_close(decoder.gene_logits(hidden, None), expected, rtol=1e-5, atol=1e-5)
    assert len(decoder(torch.randn(5, 3), {}, None)) == 3


def test_grown_models_say_the_same_of_old_genes_and_new_ones_start_at_their_share() -> None:
    old = trained()
    grown = grow_vae(old, {"batch": 3}, torch.tensor([0.2, 0.05]))
    z, library = torch.randn(4, 3), torch.full((4,), 100.0)
    before, after = old.decode(z, library, {}).logits, grown.decode(z, library, {}).logits
    torch.testing.assert_close(after[:, :G], before)
    torch.testing.assert_close(after[:, G:], after[:1, G:].expand(4, 2))
    with torch.no_grad():
        for parameter in (grown.decoder.logits.weight, grown.decoder.ask.weight):  # type: ignore[union-attr]
            parameter.zero_()
    mean = grown.decode(z, torch.full((4,), 125.0), {}).mean
    torch.testing.assert_close(mean[:, G:], torch.tensor([[20.0, 5.0]]).expand(4, 2), rtol=1e-4, atol=1e-4)


def known(folder: Path, dropout: float) -> VAE:
    """A VAE whose decoder knows vectors of the first twelve genes."""
    rows = np.random.default_rng(0).standard_normal((12, 4))
    pd.DataFrame(rows, index=[f"G{i}" for i in range(12)]).to_csv(folder / "vectors.csv")
    vectors = {"files": [folder / "vectors.csv"], "size": 4, "residual_dropout": dropout}
    model = vae(decoder={"name": "gene_table", "rows": 6, "vectors": vectors}, dropout=0.0)
    genes = [f"G{i}" for i in range(G)]
    assert model.describe_genes(pd.DataFrame({"id": genes, "symbol": genes, "cells": 1})) == [
        "Decoder. Vectors: known of 12 of the 20 genes (60%)."
    ]
    assert isinstance(model.decoder, GeneTableDecoder)
    torch.nn.init.normal_(model.decoder.ask.weight)
    return model


def test_training_takes_own_rows_from_known_genes_cell_by_cell(tmp_path: Path) -> None:
    model = known(tmp_path, 0.4)
    decoder = model.decoder
    assert isinstance(decoder, GeneTableDecoder)
    z, keys = torch.randn(50, 3), torch.arange(50)
    whole = decoder(z, {}, None)[0].detach()
    with torch.no_grad():
        own = decoder.logits.weight.clone()
        decoder.logits.weight.zero_()
        without = decoder(z, {}, None)[0]
        decoder.logits.weight.copy_(own)
    drawn = decoder.train()(z, {}, keys)[0].detach()
    kept, gone = (drawn - whole).abs() < 1e-5, (drawn - without).abs() < 1e-5
    assert (kept | gone).all()
    assert kept[:, 12:].all()  # nothing else is known of these
    assert 0.5 < kept[:, :12].float().mean() < 0.7
    parts = [decoder(z[a:b], {}, keys[a:b])[0] for a, b in ((0, 7), (7, 50))]
    torch.testing.assert_close(torch.cat(parts), drawn)


def test_a_gene_with_a_vector_alone_varies_with_the_state(tmp_path: Path) -> None:
    decoder = known(tmp_path, 0.2).decoder
    assert isinstance(decoder, GeneTableDecoder)
    torch.nn.init.zeros_(decoder.logits.weight)
    spread = decoder(torch.randn(9, 3), {}, None)[0].std(0)
    assert (spread[:12] > 0.01).all()
    assert (spread[12:] < 1e-6).all()


def test_what_decays() -> None:
    model = vae()
    names = {name for name, _ in model.named_parameters() if name.startswith("decoder.")} - undecayed(model)
    layers = {"stem", "blocks.0.inner", "blocks.0.outer", "logits", "ask"}
    assert names == {f"decoder.{name}.weight" for name in layers} | {"decoder.genes.residual"}


def test_its_formula_is_what_torch_counts() -> None:
    model = vae().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.decode(torch.randn(7, 3), torch.ones(7), {})
    assert counter.get_total_flops() == model.decoder.flops(7)


def test_its_map_takes_the_learning_rate_of_a_head() -> None:
    scales = vae(hidden=64, transfer_from=16).learning_rate_scales()
    assert scales["decoder.ask.weight"] == scales["decoder.logits.weight"] == 0.25


@pytest.fixture(scope="module")
def run(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with it, trained through the command line."""
    out = tmp_path_factory.mktemp("gene_table") / "run"
    given = ["vae.decoder={name: gene_table, rows: 8}", "vae.encoder.name=gene_set", "vae.fit_levels=true"]
    done = bgen("train", "demo/vae", f"out={out}", f"data.store={demo.store}", *given, *QUICK)
    assert done.code == 0, done
    return out


def test_it_is_exported_and_bgen_plan_knows_it(run: Path, bgen: Any) -> None:
    written = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))["vae"]["decoder"]
    assert written == {"name": "gene_table", "rows": 8, "vectors": None}
    decoder = load_directory(run / "model").vae.decoder
    assert isinstance(decoder, GeneTableDecoder)
    assert decoder.ask.weight.abs().max() > 0  # it was trained
    given = ["data.store=nowhere", "vae.decoder.name=gene_table", "--genes", 100, "--expressed", 20]
    assert bgen("plan", "vae", *given, "--gpu", "H100", "--json").code == 0


def test_finetuning_adds_genes(run: Path, bgen: Any, demo: Any, tmp_path: Path) -> None:
    new = anndata.read_h5ad(demo.cells)[:120].copy()
    new.var_names = [*new.var_names[:114], *[f"NEW{number}" for number in range(6)]]
    new.write_h5ad(tmp_path / "new.h5ad")
    asked = ["--task", "annotate", "--label", "cell_type", "--mode", "head", "--add-genes", "--out", tmp_path / "out"]
    done = bgen("finetune", run / "model", tmp_path / "new.h5ad", *asked, *QUICK)
    assert done.code == 0, done
    old, grown = (load_directory(folder / "model").vae.decoder for folder in (run, tmp_path / "out"))
    assert isinstance(old, GeneTableDecoder)
    assert isinstance(grown, GeneTableDecoder)
    assert (grown.genes.residual[120:].abs().amax(1) > 0).all()
    assert torch.equal(grown.ask.weight, old.ask.weight)
