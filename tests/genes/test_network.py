"""Regulatory networks: read, reduced, and what they say of a target that no screen perturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import bgen
from bgen.effects.context_pool import ContextPool, Controls
from bgen.effects.effects import Effects, Known
from bgen.errors import UserError
from bgen.genes.network import Network, read_network
from bgen.hub.about import EffectPooling

GENES = 80


def table(genes: int = GENES) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"E{i}" for i in range(genes)], "symbol": [f"S{i}" for i in range(genes)], "cells": 1})


def random_network(rng: np.random.Generator) -> Network:
    """Twenty regulators with six signed targets each."""
    weights = np.zeros((GENES, GENES))
    for gene in range(20):
        weights[gene, rng.choice(np.arange(gene + 1, GENES), 6, replace=False)] = rng.choice([-1, 1], 6)
    return Network(sp.csr_matrix(weights), 120)


def test_edges_are_matched_by_id_or_symbol(tmp_path: Path) -> None:
    path = tmp_path / "net.csv"
    path.write_text("TF,confidence,Target,mor\nS1,A,E2,1\nE1,A,S3,-0.5\nS1,B,other,1\nS4,A,S4,1\n")
    network = read_network(path, table())
    assert network.weights.nnz == 2
    assert (network.weights[1, 2], network.weights[1, 3]) == (1, -0.5)
    said = network.sentence(np.array([1, 4, -1]))
    assert said == "Network: 2 of 4 edges join genes of the model; 1 of the 2 perturbed genes regulate others in it."
    path.write_text("source,target\nS1,S2\n")
    assert read_network(path, table()).weights[1, 2] == 1
    for text, match in (
        ("source,gen\nS1,S2\n", "no column target"),
        ("source,target,weight\nS1,S2,strong\n", "a number for every edge"),
        ("source,target\nX1,X2\n", "no edge joins genes of the model.*X1.*E0"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=match):
            read_network(path, table())
    with pytest.raises(UserError, match="There is no file"):
        read_network(tmp_path / "none.csv", table())


def test_a_published_network_is_read(real_data: Path) -> None:
    cells = anndata.read_h5ad(real_data / "papalexi_eccite_20729x299.h5ad", backed="r")
    names = cells.var_names.astype(str)
    network = read_network(real_data / "dorothea_hs_ABC.csv", pd.DataFrame({"id": names, "symbol": names, "cells": 1}))
    assert network.edges_in_file == 13_223
    assert network.weights.nnz > 0
    rows, regulated = network.factors(1.0)
    assert rows.shape == (len(names), len(regulated))


def test_embeddings_give_back_what_each_gene_regulates() -> None:
    network = random_network(np.random.default_rng(0))
    rows, regulated = network.factors(4.0)
    direct = network.weights.toarray()
    expected = direct + direct @ direct / 4 + direct @ direct @ direct / 16
    np.testing.assert_allclose(rows @ regulated, expected, atol=1e-5)
    assert np.sqrt((rows[:20] ** 2).sum(1).mean()) == pytest.approx(4.0, rel=1e-5)
    assert not rows[20:].any()


def test_the_network_tells_of_unseen_targets_and_a_wrong_one_is_left_aside() -> None:
    rng = np.random.default_rng(1)
    network = random_network(rng)
    rows, regulated = network.factors(4.0)
    truth = -0.5 * rows @ regulated
    truth[np.arange(20), np.arange(20)] = -2.0
    names = [f"E{i}" for i in range(19)]
    values = (truth[:19] + 0.05 * rng.normal(size=(19, GENES))).astype(np.float32)
    plain = Effects(
        sets=[(name,) for name in names],
        doses=np.full(19, np.nan),
        general=values,
        cells=np.ones(19, np.float32),
        own=np.zeros((0, GENES), np.float32),
        own_of=np.zeros((0, 2), np.int64),
        pool=ContextPool(np.zeros((1, GENES), np.float32), np.ones(1), np.zeros((1, GENES), np.float32)),
        pooling=EffectPooling(knock_down=-3.0),
    )
    many = Controls(np.full(GENES, 1e5), np.zeros(GENES))  # so many molecules that log(1 + m) changes as log m does
    others = np.setdiff1d(np.arange(GENES), [19])

    def predict(table: np.ndarray[Any, Any], network: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
        every = [*names, "E19"]
        vectors = dict(zip(every, table.astype(np.float32), strict=False))
        members = Known(vectors, dict(zip(every, range(20), strict=True)), network)
        return plain.of(["E19"], None, many, members=members)

    told = predict(rows, regulated)
    assert np.corrcoef(told[others], truth[19, others])[0, 1] > 0.9
    assert told[19] == pytest.approx(-3.0, abs=0.1)  # the typical fold
    nothing = np.zeros_like(rows)
    wrong = rng.permutation(rows[:20])
    shuffled = np.concatenate([wrong, rows[20:]])
    error = [
        np.square(predict(table, network)[others] - truth[19, others]).sum()
        for table, network in ((nothing, None), (shuffled, regulated))
    ]
    assert error[1] < 1.1 * error[0]


def test_a_model_keeps_its_network(bgen: Any, demo: Any, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(demo.cells)
    edges, names = cells.uns["truth"]["network"], np.asarray(cells.var_names)
    path = tmp_path / "net.csv"
    pd.DataFrame({"source": names[edges["source"]], "target": names[edges["target"]]}).to_csv(path, index=False)
    asked = ["finetune", demo.model, demo.cells, "--perturbation", "perturbation", "--control", "control"]
    asked += ["--mode", "head", "--out", tmp_path / "out", "--network", path, "train.steps=5", "train.eval_every=5"]
    other = bgen(*asked, "--task", "generate")
    assert other.code == 2
    assert "--network is about unseen targets" in other.err
    done = bgen(*asked, "--task", "perturb", "train.global_batch=64", "track.progress=false")
    assert done.code == 0, done
    assert "edges join genes of the model; 3 of the 3 perturbed genes" in " ".join(done.err.split())
    about = json.loads((tmp_path / "out/model/config.json").read_text())["about"]["perturbation"]
    assert about["network"]["edges"] == len(edges["source"])
    unseen = next(names[i] for i in edges["source"] if names[i] not in about["perturbations"])
    model = load(tmp_path / "out" / "model")
    assert len(model.saved.module.averages.network) == about["network"]["components"]
    assert list(model.perturb(cells, unseen, n=50).uns["bgen"]["unseen"]) == [unseen]


def load(folder: Path) -> Any:
    return bgen.load(folder)
