"""Tokens of which it is known which genes they read, gene sets and regulators: what they read, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bgen.config.load import load_config
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.hub.directory import load_directory
from bgen.models.grow import grow_vae
from bgen.models.vae.encoders.gene_set import GeneSetEncoder
from bgen.models.vae.vae import VAE
from bgen.train.engine.parameter_groups import undecayed

G = 24
GENES = pd.DataFrame({"id": [f"E{i}" for i in range(G)], "symbol": [f"G{i}" for i in range(G)], "cells": 1})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("known")
    sets = {"a": range(8), "b": range(2, 6), "c": range(8, 14)}
    text = "".join(f"{name}\t.\t" + "\t".join(f"G{i}" for i in of) + "\n" for name, of in sets.items())
    (folder / "sets.gmt").write_text(text)
    edges = [("G1", f"G{i}", -1 if i % 2 else 1) for i in range(14, 19)] + [("X", f"G{i}", 2) for i in range(18, 24)]
    (folder / "net.csv").write_text("source,target,weight\n" + "\n".join(f"{a},{b},{w}" for a, b, w in edges))
    return folder


def vae(files: Path, bias: str = "hard", **settings: object) -> VAE:
    torch.manual_seed(0)
    known = {
        "groups": {"file": files / "sets.gmt", "tokens": 3, "at_least": 2, "bias": bias, "hierarchy": True},
        "network": {"file": files / "net.csv", "tokens": 2, "at_least": 2, "bias": bias, "relations": True},
    }
    encoder = {"name": "gene_set", "tokens": 2, "width": 8, "rows": 6, "token_blocks": 1, **known, **settings}
    model = VAE(VAEConfig.model_validate({"latent": 3, "hidden": 16, "blocks": 1, "encoder": encoder}), G, {}).eval()
    said = model.describe_genes(GENES)
    assert [sentence.split(" hold ")[1][:2] for sentence in said] == ["14", "10"]
    return model


def cells(dense: Tensor) -> CellBatch:
    rows, genes = dense.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)))
    ids = torch.arange(len(dense))
    return CellBatch(indptr, genes.int(), dense[rows, genes], dense.shape[1], keys=ids, cells=ids)


def tokens(model: VAE, dense: Tensor) -> Tensor:
    assert isinstance(model.encoder, GeneSetEncoder)
    batch = cells(dense)
    return model.encoder.tokens(batch, batch.counts).detach()


@pytest.mark.parametrize("bias", ["hard", "soft"])
def test_a_token_is_told_how_busy_its_pathway_is(files: Path, bias: str) -> None:
    """What it reads is a mean over the pathway's molecules, which stays the same when all of its genes double."""
    model, dense = vae(files, bias), torch.ones(2, G)
    dense[1, 8:14] = 2.0  # all of c
    before, after = tokens(model, dense)
    assert (after - before)[3].abs().amax() > 0.01
    assert isinstance(model.encoder, GeneSetEncoder)
    torch.nn.init.zeros_(model.encoder.of_amount.weight)
    before, after = tokens(model, dense)
    assert ((after - before)[3].abs().amax() < 1e-6) == (bias == "hard")


def test_a_hard_token_reads_its_members_only_and_without_any_is_its_seed(files: Path) -> None:
    model = vae(files)
    assert isinstance(model.encoder, GeneSetEncoder)
    dense = torch.ones(2, G)
    dense[1, [0, 9, 20]] = 4.0  # of a, of c, and of the regulator X
    torch.nn.init.zeros_(model.encoder.of_amount.weight)  # which is told of what all tokens have read
    before, after = tokens(model, dense)
    moved = (after - before).abs().amax(1)
    assert (moved[:2] > 1e-4).all()  # free tokens
    assert (moved[[2, 3, 5]] > 1e-4).all()  # a, c and X, in the order in which they are chosen
    assert (moved[[4, 6]] < 1e-6).all()  # b and G1
    few = torch.zeros(1, G)
    few[0, [8, 9, 10]] = 3.0  # genes of c alone
    found = tokens(model, few)[0]
    seeds = model.encoder.seed
    assert [bool(torch.equal(found[m], seeds[m])) for m in range(7)] == [False, False, True, False, True, True, True]


def test_a_soft_token_reads_all_genes_and_its_members_more(files: Path) -> None:
    model = vae(files, "soft")
    assert isinstance(model.encoder, GeneSetEncoder)
    factor = model.encoder._factor()
    assert factor is not None
    assert (factor[:, :2] == 1).all()
    torch.testing.assert_close(factor[:8, 2], torch.full((8,), float(np.exp(2.0))))
    assert (factor[8:, 2] == 1).all()
    dense = torch.ones(2, G)
    dense[1, 23] = 9.0
    before, after = tokens(model, dense)
    assert ((after - before).abs().amax(1) > 1e-5).all()
    for prior in model.encoder.priors.values():
        assert isinstance(prior.gate, torch.nn.Parameter)


def test_the_sign_of_an_edge_is_read(files: Path) -> None:
    model = vae(files)
    assert isinstance(model.encoder, GeneSetEncoder)
    dense = torch.ones(1, G)
    before = tokens(model, dense)
    assert model.encoder.sign is not None
    model.encoder.sign.neg_()
    after = tokens(model, dense)
    moved = (after - before).abs().amax(2)[0]
    assert (moved[:5] == 0).all()
    assert (moved[5:] > 1e-4).all()


def test_relations_move_attention_among_tokens(files: Path) -> None:
    model = vae(files)
    assert isinstance(model.encoder, GeneSetEncoder)
    relations = model.encoder.relations
    assert relations is not None
    upwards, downwards = relations[:2]
    assert np.argwhere(upwards.numpy()).tolist() == [[4, 2]]  # b looks at a, in which it lies
    assert torch.equal(downwards, upwards.T)
    batch = cells(torch.ones(3, G))
    before = model.encode(batch)[0].detach()
    with torch.no_grad():
        model.encoder.token_blocks[0].gate.zero_()  # type: ignore[union-attr, operator]
    assert (model.encode(batch)[0] - before).abs().max() > 1e-6


def test_what_decays_how_much_it_computes_and_that_all_of_it_is_trained(files: Path) -> None:
    model = vae(files, "soft", values=True).train()
    assert isinstance(model.encoder, GeneSetEncoder)
    dense = (torch.rand(40, G, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    batch = cells(dense)
    free = undecayed(model)
    assert {"encoder.priors.groups.gate", "encoder.priors.network.gate", "encoder.token_blocks.0.gate"} <= free
    assert "encoder.of_sign.weight" not in free
    model(batch)["loss"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sparse = model.encoder.read.sparse_flops(len(batch.counts), 2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.encode(batch)
    assert counter.get_total_flops() + sparse == model.latents_flops(40, len(batch.counts))


def test_grown_models_say_the_same_of_what_they_know(files: Path) -> None:
    old = vae(files)
    grown = grow_vae(old, {}, torch.tensor([0.1, 0.2]))
    dense = torch.poisson(torch.full((5, G), 1.0))
    new = torch.zeros(5, 2)
    torch.testing.assert_close(grown.encode(cells(torch.cat((dense, new), 1))), old.encode(cells(dense)))
    new[:, 1] = 7
    after = grown.encode(cells(torch.cat((dense, new), 1)))
    torch.testing.assert_close(after, old.encode(cells(dense)), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def run(bgen: Any, demo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A run with sets and vectors that was resumed, whose files are gone now; its settings, and what was said."""
    folder = tmp_path_factory.mktemp("run")
    genes = pd.read_csv(demo.vae / "model" / "genes.csv")["symbol"].tolist()
    members = [[*genes[10 * k : 10 * k + 20], f"EXTRA{k}", f"EXTRA{(3 * k) % 8}"] for k in range(8)]
    (folder / "sets.gmt").write_text("".join(f"s{k}\t.\t" + "\t".join(of) + "\n" for k, of in enumerate(members)))
    vectors = f"vectors: {{sets: {folder}/sets.gmt, size: 6}}"
    groups = f"groups: {{file: {folder}/sets.gmt, tokens: 4}}"
    encoder = f"vae.encoder={{name: gene_set, tokens: 2, width: 16, rows: 8, {groups}, {vectors}}}"
    decoder = f"vae.decoder={{name: gene_table, rows: 8, {vectors}}}"
    given = [f"data.store={demo.store}", encoder, decoder, "train.steps=8", "train.global_batch=64"]
    given += ["train.eval_every=4", "train.checkpoint_every=4", "track.mlflow=false", "track.progress=false"]
    out = folder / "run"
    done = bgen("train", "demo/vae", f"out={out}", *given)
    assert done.code == 0, done
    resumed = bgen("train", "demo/vae", f"out={out}", *given, "train.steps=12", "--resume")
    assert resumed.code == 0, resumed
    (folder / "sets.gmt").unlink()
    return out, given, done.err


def test_from_the_command_line_coverage_is_printed_and_the_model_needs_no_file(
    bgen: Any, run: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    out, given, said = run
    assert "4 of 8 gene sets of sets.gmt hold 80 of the 120 genes (67%)." in said
    assert "Vectors: known of 90 of the 120 genes (75%)." in said
    assert str(out.parent) not in json.dumps(json.loads((out / "model" / "config.json").read_text())["vae"])
    model = load_directory(out / "model").vae
    assert isinstance(model.encoder, GeneSetEncoder)
    assert model.encoder.genes.has_vector.sum() == 90
    done = bgen("train", "demo/vae", f"out={tmp_path / 'other'}", *given)
    assert done.code == 2
    assert "sets.gmt cannot be read" in done.err


def test_genes_of_the_sets_that_training_never_saw_are_added_to_the_vae_and_to_a_flow_on_it(
    bgen: Any, demo: Any, run: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    out, _, _ = run
    quick = ["train.steps=4", "train.global_batch=64", "train.eval_every=0", "train.patience=0"]
    quick += ["track.mlflow=false", "track.progress=false"]
    flow = tmp_path / "flow"
    done = bgen("train", "demo/flow", f"out={flow}", f"data.store={demo.store}", f"flow.vae={out}", *quick)
    assert done.code == 0, done
    (tmp_path / "genes.txt").write_text("extra1\nEXTRA2\nOTHER\n")
    done = bgen("extend", flow / "model", "--genes", tmp_path / "genes.txt", "--out", tmp_path / "model")
    assert done.code == 0, done
    done = bgen("generate", tmp_path / "model", "--n", 20, "--out", tmp_path / "cells.h5ad")
    assert done.code == 0, done
    cells = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.var["source"].tolist() == [""] * 120 + ["vector"] * 2
    assert np.isfinite(cells.X.data).all()
    asked = ["--task", "generate", "--mode", "full", "--out", tmp_path / "tuned", *quick, "train.eval_every=4"]
    new = anndata.read_h5ad(demo.cells)[:80].copy()
    new.var_names = ["extra1", *new.var_names[1:]]
    new.write_h5ad(tmp_path / "new.h5ad")
    done = bgen("finetune", tmp_path / "model", tmp_path / "new.h5ad", *asked, "--floor", 0.5)
    assert done.code == 0, done
    tuned = load_directory(tmp_path / "tuned" / "model")
    assert tuned.genes["source"].tolist()[-2:] == ["vector, fine-tuned", "vector"]
    assert tuned.about.extension is not None
    assert tuned.vae.vector_tables["decoder"].map is not None
    assert not torch.equal(tuned.vae.decoder.logits.weight[120], torch.zeros(64))  # type: ignore[union-attr,index]


def test_a_run_is_not_resumed_with_another_file(bgen: Any, demo: Any, tmp_path: Path) -> None:
    genes = pd.read_csv(demo.vae / "model" / "genes.csv")["symbol"].tolist()
    file = tmp_path / "sets.gmt"
    file.write_text("a\t.\t" + "\t".join(genes[:60]) + "\n")
    groups = f"{{file: {file}, tokens: 1}}"
    encoder = f"vae.encoder={{name: gene_set, tokens: 2, width: 16, rows: 8, groups: {groups}}}"
    given = ["train", "demo/vae", f"out={tmp_path / 'run'}", f"data.store={demo.store}", encoder]
    given += ["train.steps=4", "train.global_batch=64", "train.eval_every=0", "train.patience=0"]
    given += ["track.mlflow=false", "track.progress=false"]
    assert bgen(*given).code == 0
    file.write_text("a\t.\t" + "\t".join(genes[30:90]) + "\n")
    done = bgen(*given, "train.steps=8", "--resume")
    assert done.code == 2
    assert "known_of_genes" in done.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("groups: {hierarchy: true}", "tokens look at one another in token_blocks only"),
        ("network: {relations: true}", "tokens look at one another in token_blocks only"),
        ("groups: {}, attention: false, tokens: 1", "groups and network need attention=true"),
        ("groups: {files: a}", "vae.encoder.groups.files: unknown key. Did you mean 'file'?"),
    ],
)
def test_mistakes_in_settings_are_named(more: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("vae", [f"vae.encoder={{name: gene_set, {more}}}"])
    assert said in str(caught.value)
