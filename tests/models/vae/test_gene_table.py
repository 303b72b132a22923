"""The gene table: rows made from vectors, rows that training takes away, and genes that it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bgen.config.gene_set import VectorsConfig
from bgen.errors import UserError
from bgen.models.vae.gene_table import GeneTable

G = 30
GENES = pd.DataFrame({"id": [f"E{i}" for i in range(G)], "symbol": [f"G{i}" for i in range(G)], "cells": 1})


def table(folder: Path, size: int = 4, learned: bool = True, dropout: float = 0.5, numbers: int = 3) -> GeneTable:
    """A table with vectors of all genes but the last five."""
    rows = np.random.default_rng(0).standard_normal((G - 5, numbers))
    file = folder / "vectors.csv"
    pd.DataFrame(rows, index=[f"g{i}" for i in range(G - 5)]).to_csv(file)
    torch.manual_seed(0)
    made = GeneTable(G, 6, VectorsConfig(files=[file], size=size, residual_dropout=dropout), learned=learned)
    said = made.describe(GENES)
    assert said == ["Vectors: known of 25 of the 30 genes (83%)."]
    return made


def test_a_row_is_learned_and_made_from_a_vector(tmp_path: Path) -> None:
    made = table(tmp_path).eval()
    assert made.residual is not None
    assert made.of_vector is not None
    row = made.residual + made.vectors @ made.of_vector.weight.T
    torch.testing.assert_close(made(), torch.nn.functional.layer_norm(row, (6,), eps=1e-2))
    assert (made.vectors[:25, 3] == 0).all()  # three numbers in four places
    assert made.vectors[:25].square().mean().sqrt() == pytest.approx(1, rel=1e-5)
    assert not made.vectors[25:].any()


def test_a_gene_without_a_learned_row_is_known_by_its_vector(tmp_path: Path) -> None:
    made = table(tmp_path).eval()
    made.start_genes(20)
    rows = made().detach()
    assert (rows[20:25].abs().amax(1) > 0.1).all()
    assert (rows[25:] == 0).all()  # nothing is known of them


def test_vectors_of_many_numbers_are_reduced_and_keep_their_angles(tmp_path: Path) -> None:
    made = table(tmp_path, size=12, numbers=12)
    fewer = table(tmp_path, size=4, numbers=12)
    assert fewer.vectors.shape == (G, 4)
    whole, reduced = made.vectors[:25], fewer.vectors[:25]
    kept = reduced.square().sum() / reduced.square().mean() * whole.square().mean() / whole.square().sum()
    assert kept == pytest.approx(4 / 12)  # scaled to the same variance of a number
    corr = torch.corrcoef(torch.stack(((whole @ whole.T).flatten(), (reduced @ reduced.T).flatten())))[0, 1]
    assert corr > 0.6


def test_training_takes_learned_rows_away_by_step_and_only_where_there_is_a_vector(tmp_path: Path) -> None:
    made = table(tmp_path).train()
    assert made.residual is not None
    with torch.no_grad():
        made.residual.normal_()
    without = table(tmp_path).eval()
    without.start_genes(0)
    plain, bare = made.eval()().detach(), without().detach()
    made.train()
    alone = [(made(step).detach() == bare).all(1) for step in (1, 2)]
    kept = [(made(step).detach() == plain).all(1) for step in (1, 2)]
    assert (alone[0] | kept[0]).all()
    assert 5 <= alone[0].sum() <= 20
    assert not alone[0][25:].any()
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(made(1), made(1))  # the same for all ranks and micro batches of a step


def test_a_table_may_be_made_from_vectors_alone(tmp_path: Path) -> None:
    made = table(tmp_path, learned=False)
    assert [name for name, _ in made.named_parameters()] == ["of_vector.weight"]
    assert list(made.tables()) == []
    assert torch.equal(made.train()(3), made.eval()(0))


def test_files_that_do_not_help_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training needs files of vectors \(vectors\.files\) or gene sets"):
        GeneTable(G, 6, VectorsConfig()).describe(GENES)
    with pytest.raises(UserError, match="there is no file"):
        GeneTable(G, 6, VectorsConfig(files=[tmp_path / "none.csv"])).describe(GENES)
    (tmp_path / "other.csv").write_text("name,a\nx,1\ny,2\n")
    with pytest.raises(UserError, match="no gene of the model is known by name; its genes look like E0, E1, E2"):
        GeneTable(G, 6, VectorsConfig(files=[tmp_path / "other.csv"])).describe(GENES)
