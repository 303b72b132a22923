"""``bgen extend``: genes that no training has seen, in a model that works as before and marks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import bgen as package
from bgen.config.flow import FlowConfig, MemberSizes, SampleConfig
from bgen.config.vae import VAEConfig
from bgen.errors import UserError
from bgen.genes.table import TUNED
from bgen.hub.about import About, Perturbation
from bgen.hub.directory import ColumnInfo, SavedModel, load_directory, save_model
from bgen.models.annotator import Annotator
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE
from bgen.tasks.extend import extend_model
from bgen.tasks.finetune.grow import tuned_genes
from bgen.tasks.load import Model, load_model

G = 60
OTHERS = 30
LEVELS = torch.tensor([1.0, 0.5, -0.5, 0.2])
"""What vectors tell of levels."""

GENES = pd.DataFrame({"id": [f"E{i}" for i in range(G)], "symbol": [f"SYM{i}" for i in range(G)], "cells": 1})


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of the model's genes but the last five, and of thirty names beyond them."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.csv"
    names = [*GENES["symbol"][: G - 5], *[f"NEW{i}" for i in range(OTHERS)]]
    pd.DataFrame(np.random.default_rng(0).standard_normal((len(names), 5)), index=names).to_csv(path)
    return path


def make_vae(vectors: Path, encoder: bool = True, **changes: Any) -> VAE:
    """A VAE whose genes have levels that their vectors tell, and that varies with the state."""
    torch.manual_seed(0)
    told = {"files": [vectors], "size": 4}
    config: dict[str, Any] = {"latent": 3, "hidden": 16, "blocks": 1, **changes}
    config["decoder"] = {"name": "gene_table", "rows": 6, "vectors": told}
    if encoder:
        config["encoder"] = {"name": "gene_set", "rows": 8, "width": 8, "tokens": 2, "vectors": told}
    vae = VAE(VAEConfig.model_validate(config), G, {"batch": 2}).eval()
    vae.describe_genes(GENES)
    table = vae.vector_tables["decoder"]
    with torch.no_grad():
        torch.nn.init.normal_(vae.decoder.ask.weight)  # type: ignore[union-attr,arg-type]
        vae.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 6.0]))
        levels = vae.decode(vae.latent_mean[None, :-1], torch.ones(1), {}).logits[0]
        vae.decoder.shift_genes(table.vectors @ LEVELS - levels)
        vae.log_library_range.copy_(torch.tensor([5.0, 7.0]))
    return vae


def saved(module: Any) -> SavedModel:
    columns = {"batch": ColumnInfo("batch", "category", ["a", "b"]), "kind": ColumnInfo("kind", "category", ["x", "y"])}
    combinations = pd.DataFrame({"batch": [0, 1], "kind": [0, 1], "cells": [10, 20]})
    about = About(name="small", organism="synthetic", cells=30)
    return SavedModel(module, GENES, columns, combinations, SampleConfig(steps=2), about, {"headline": "good"})


@pytest.fixture(scope="module")
def parent(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a flow whose VAE knows genes by vectors."""
    vae = make_vae(vectors)
    config = FlowConfig.model_validate({"conditions": ["kind"], "backbone": {"name": "mlp", "width": 16, "layers": 1}})
    folder = tmp_path_factory.mktemp("models") / "parent"
    model = saved(LatentFlow(config, vae, {"kind": 2}, {}).eval())
    model.metrics = None
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def extended(parent: Path, bgen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with twenty genes more, through the command line."""
    folder = tmp_path_factory.mktemp("extended")
    rows = ["id,symbol", *[f"N{i},NEW{i}" for i in range(20)], "E3,SYM3", "nobody,nothing"]
    (folder / "genes.csv").write_text("\n".join(rows) + "\n")
    done = bgen("extend", parent, "--genes", folder / "genes.csv", "--out", folder / "model")
    assert done.code == 0, done
    said = " ".join(done.err.split())
    assert "22 genes are asked for: 20 have a vector (20 by name); 1 are in the model already; 1 are left out" in said
    assert "1 are left out, since the model has no vector of them: 'nobody'." in said
    assert "of 55 trained genes with a vector, left out a fifth at a time, vectors tell" in said
    return folder / "model"


def test_what_is_said_of_old_genes_and_cells_stays(parent: Path, extended: Path) -> None:
    old, new = load_directory(parent), load_directory(extended)
    z, library = torch.randn(6, 3), torch.full((6,), 1000.0)
    before, after = old.vae.decode(z, library, {}).logits, new.vae.decode(z, library, {}).logits
    torch.testing.assert_close(after[:, :G], before)
    assert after.shape == (6, G + 20)
    assert (after[:, G:].std(0) > 1e-3).all()  # they vary with the state, though nothing was learned of them
    counts = np.random.default_rng(0).poisson(2.0, (5, G)).astype(np.float32)
    cells = anndata.AnnData(counts, var=GENES.set_index("id"))
    np.testing.assert_allclose(Model(new).encode(cells, floor=0.1)[0], Model(old).encode(cells)[0], atol=1e-5)


def test_levels_follow_the_vectors_and_generated_cells_keep_the_counts_of_old_genes(
    parent: Path, extended: Path, vectors: Path
) -> None:
    old, new = load_directory(parent).vae, load_directory(extended).vae
    state = old.latent_mean[None, :-1]
    logits = new.decode(state, torch.ones(1), {}).logits[0].detach()
    told = new.vector_tables["decoder"].vectors @ LEVELS
    assert torch.corrcoef(torch.stack((logits[G:], told[G:])))[0, 1] > 0.95
    known, library = old.latent_mean[-1].exp(), new.latent_mean[-1].exp()
    expected = new.decode(state, library[None], {}).mean[0]
    torch.testing.assert_close(expected[:G], old.decode(state, known[None], {}).mean[0], rtol=1e-4, atol=1e-4)
    larger = new.latent_mean[-1] - old.latent_mean[-1]
    torch.testing.assert_close(new.log_library_range, old.log_library_range + larger)


def test_genes_are_marked_in_the_directory_its_card_and_generated_cells(extended: Path) -> None:
    model = load_model(extended)
    table = pd.read_csv(extended / "genes.csv", keep_default_na=False)
    assert table["source"].tolist() == [""] * G + ["vector"] * 20
    card = (extended / "README.md").read_text(encoding="utf-8")
    assert "20 genes were added to **small**" in card
    assert "55 trained genes with a vector" in card
    cells = model.generate(30, where={"kind": "x"})
    assert (cells.var["source"] == "vector").sum() == 20
    assert np.asarray(cells.X[:, G:].sum(0)).any()
    assert model.saved.about.name == "model"


def test_denoised_cells_mark_them(extended: Path) -> None:
    model = load_model(extended)
    names = ["E1", "N2", *[f"E{i}" for i in range(2, G)], "alien"]
    counts = np.random.default_rng(0).poisson(2.0, (5, len(names))).astype(np.float32)
    cells = anndata.AnnData(counts, var=pd.DataFrame(index=names))
    denoised = model.denoise(cells, floor=0.1)
    assert denoised.var["bgen_source"].tolist() == ["", "vector", *[""] * (G - 2), ""]
    assert np.isfinite(denoised.layers["denoised"][:, :-1]).all()
    assert "bgen_source" not in cells.var


def test_it_can_be_extended_again_and_what_was_foretold_teaches_nothing(extended: Path) -> None:
    model = load_directory(extended)
    told: list[str] = []
    twice = extend_model(model, [f"new{i}" for i in range(18, 25)], say=told.append)
    assert told[0].startswith("7 genes are asked for: 7 have a vector (7 by name); none is in the model yet.")
    assert twice.about.extension is not None
    assert twice.about.extension.genes == 27
    assert twice.about.extension.trained_genes == 55
    assert model.about.extension is not None
    assert twice.about.extension.level_r2 == pytest.approx(model.about.extension.level_r2, abs=1e-5)
    assert twice.about.extension.parent.name == "small"


def test_orthologs_and_files_tell_of_genes(parent: Path, vectors: Path, tmp_path: Path) -> None:
    table = pd.read_csv(vectors, index_col=0)
    more = pd.concat([table, pd.DataFrame(np.ones((1, 5)), index=["FRESH"], columns=table.columns)])
    more.to_csv(tmp_path / "more.csv")
    (tmp_path / "pairs.tsv").write_text("mouse\thuman\nMus7\tnothing\nMus7\tSYM7\nMus7\tSYM8\n")
    told: list[str] = []
    model = load_model(parent).add_genes(
        ["Mus7", "fresh", "NEW1"], vectors=[tmp_path / "more.csv"], orthologs=tmp_path / "pairs.tsv", say=told.append
    )
    assert "3 have a vector (1 by an ortholog, 1 by name, 1 from given files)" in told[1]
    found = model.saved.vae.vector_tables["decoder"].vectors
    torch.testing.assert_close(found[G], found[7])  # the first that has a vector
    assert found[G + 1].any()
    assert not torch.equal(found[G], found[8])
    with pytest.raises(UserError, match="none of the new genes in its first column, such as Mus7; they are called 'A'"):
        load_model(parent).add_genes(["A"], orthologs=tmp_path / "pairs.tsv")


def test_lists_of_genes_from_anywhere(parent: Path, tmp_path: Path) -> None:
    model = load_model(parent)
    cells = anndata.AnnData(np.ones((2, 3), np.float32), var=pd.DataFrame(index=["NEW1", "E2", "NEW3"]))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "plain.txt").write_text("NEW1\nNEW3\nNEW3\n")
    (tmp_path / "named.tsv").write_text("gene_name\tgene_id\nNEW1\tENSG00000000001.4\nNEW3\tENSG00000000002.1\n")
    frame = pd.DataFrame({"symbol": ["NEW1", "NEW3"]}, index=["A", "B"])
    for genes in (cells, tmp_path / "cells.h5ad", tmp_path / "plain.txt", ["NEW1", "NEW3"], frame):
        added = model.add_genes(genes, say=lambda _: None).saved.genes.iloc[G:]
        assert len(added) == 2, genes
    table = model.add_genes(tmp_path / "named.tsv", say=lambda _: None).saved.genes.iloc[G:]
    assert table["id"].tolist() == ["ENSG00000000001", "ENSG00000000002"]
    assert table["symbol"].tolist() == ["NEW1", "NEW3"]


def test_what_cannot_be_added_is_told(parent: Path, extended: Path, vectors: Path, tmp_path: Path, bgen: Any) -> None:
    model = load_model(parent)
    with pytest.raises(UserError, match=r"No gene can be added. 2 genes are asked for: 0 have a vector; none is in"):
        model.add_genes(["a", "b"], say=lambda _: None)
    with pytest.raises(UserError, match="1 are in the model already"):
        model.add_genes(["E1"], say=lambda _: None)
    plain = VAE(VAEConfig(latent=3, hidden=8, blocks=1), G, {})
    with pytest.raises(UserError, match=r"decoder has no vectors of genes.*train its VAE with vae.decoder="):
        extend_model(saved(plain), ["NEW1"])
    (tmp_path / "empty.csv").write_text("")
    done = bgen("extend", parent, "--genes", tmp_path / "empty.csv", "--out", tmp_path / "out")
    assert done.code == 2
    assert "cannot be read as a table" in done.err
    assert not (tmp_path / "out").exists()
    done = bgen("extend", parent, "--genes", vectors, "--out", extended)
    assert done.code == 2
    assert "is there already" in done.err


def test_a_directory_without_its_map_says_how_to_get_one(extended: Path, tmp_path: Path) -> None:
    model = load_directory(extended)
    for table in model.vae.vector_tables.values():
        table.map = None
    save_model(model, tmp_path / "old")
    assert not (tmp_path / "old" / "gene_vectors.safetensors").exists()
    with pytest.raises(UserError, match="bgen export RUN --out MODEL"):
        load_model(tmp_path / "old").add_genes(["NEW25"])


def test_json_says_what_was_done(parent: Path, tmp_path: Path, bgen: Any) -> None:
    (tmp_path / "genes.txt").write_text("NEW1\n")
    done = bgen("extend", parent, "--genes", tmp_path / "genes.txt", "--out", tmp_path / "m", "--json")
    assert done.code == 0, done
    told = json.loads(done.out)
    assert told["genes"] == G + 1
    assert told["extension"]["ways"] == {"by an ortholog": 0, "by name": 1, "from given files": 0}


def test_without_vectors_in_the_encoder_new_genes_tell_it_nothing(vectors: Path) -> None:
    told: list[str] = []
    model = Model(extend_model(saved(make_vae(vectors, encoder=False, likelihood="zinb")), ["NEW1"], say=told.append))
    assert "The encoder has no vectors: counts of the added genes tell it nothing of a cell's state." in told
    assert model.saved.metrics is None  # they are of another model
    mean = model.decode(np.zeros((1, 3), np.float32), np.full(1, 1000, np.float32))
    assert np.isfinite(mean).all()
    assert mean[0, G] > 0


def test_classifiers_and_perturbation_models_are_extended_whole(vectors: Path, tmp_path: Path) -> None:
    vae = make_vae(vectors)
    annotator = Annotator(vae, torch.ones(2)).eval()
    torch.nn.init.normal_(annotator.head.weight)
    larger = extend_model(saved(annotator), ["NEW1"], say=lambda _: None).module
    assert isinstance(larger, Annotator)
    assert larger.vae.n_genes == G + 1
    assert torch.equal(larger.head.weight, annotator.head.weight)
    sizes = MemberSizes(members=1, labels=2, largest=1, names=G + 2, vector=2, amount=None, forget=0.1)
    config = FlowConfig.model_validate({"source": "neighbours", "backbone": {"width": 16, "layers": 1}})
    flow = LatentFlow(config, vae, {}, {}, {"guide": sizes})
    told = torch.randn(G + 2, 2)
    labels = torch.tensor([[-1], [0]])
    flow.conditions.member_embeddings["guide"].describe(told, labels, torch.tensor([[-1], [G + 1]]), 1.0)
    model = saved(flow)
    facts = Perturbation(perturbations=["NEW1"], named=["NEW9", "NEW1"])
    model.about = model.about.model_copy(update={"perturbation": facts})
    part = extend_model(model, ["new9"], say=lambda _: None).module.conditions.member_embeddings["guide"]  # type: ignore[union-attr]
    assert torch.equal(part.vectors[G], told[G])  # NEW9 is a gene now, and keeps what was known of it
    assert part.label_vector.flatten().tolist() == [-1, G + 2]
    assert torch.equal(part.vectors[G + 2], told[G + 1])


def test_fine_tuning_says_which_of_them_it_has_seen(extended: Path) -> None:
    model = load_model(extended)
    names = [*GENES["id"], "N2", "N3"]
    counts = np.ones((4, len(names)), np.float32)
    counts[:, -1] = 0
    cells = model.read(anndata.AnnData(counts, var=pd.DataFrame(index=names)), floor=0.1)
    table = tuned_genes(model.saved.genes, cells).set_index("id")["source"]
    assert table["N2"] == TUNED
    assert table["N3"] == table["N4"] == "vector"
    assert table["E1"] == ""


def test_python_offers_it(parent: Path) -> None:
    assert len(package.load(parent).add_genes(["NEW1"], say=lambda _: None).genes) == G + 1
