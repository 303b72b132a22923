"""Cells of known programmes: what they are made of, and what is written of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bgen.errors import UserError
from bgen.genes.sets import read_gene_sets
from data_tools.simulate.programmes import simulate_programmes, write_known
from data_tools.simulate.simulate import simulate


@pytest.mark.parametrize("preset", ["pathways", "regulators"])
def test_counts_follow_the_programmes(preset: str) -> None:
    cells = simulate_programmes(preset, cells=400, seed=1)
    assert (cells.X != simulate_programmes(preset, cells=400, seed=1).X).nnz == 0
    truth, counts = cells.uns["truth"], cells.X.toarray()
    assert ((counts == np.round(counts)).all(), counts.sum(1).min() > 0) == (True, True)
    share = counts / counts.sum(1, keepdims=True)
    for programme in range(3):
        members = truth["programme"] == programme
        up = members & (truth["loading"] > 0)
        assert np.corrcoef(share[:, up].sum(1), cells.obsm["truth"][:, programme])[0, 1] > 0.3
        assert (truth["loading"][members] < 0).any() == (preset == "regulators")


def test_what_is_known_is_written_as_sets_or_edges(bgen: Any, tmp_path: Path) -> None:
    given = ["--cells", 100, "--out", tmp_path / "a.h5ad", "--known", tmp_path / "a.gmt"]
    done = bgen("data", "simulate", "--preset", "pathways", *given)
    assert done.code == 0, done
    sets = read_gene_sets(tmp_path / "a.gmt").members
    assert (len(sets), {len(genes) for genes in sets.values()}) == (32, {15})
    cells = simulate_programmes("regulators", cells=100)
    write_known(cells, tmp_path / "b.csv")
    edges = pd.read_csv(tmp_path / "b.csv")
    assert (len(edges), set(edges["weight"])) == (480, {-1, 1})
    assert set(edges["source"]) <= set(cells.var_names)
    assert not set(edges["source"]) & set(edges["target"])
    done = bgen("data", "simulate", "--known", tmp_path / "c.gmt", "--out", tmp_path / "c.h5ad")
    assert (
        done.code,
        "--known is for the presets pathways, regulators, atlas, lines, crowd, not for demo." in done.err,
    ) == (2, True)
    with pytest.raises(UserError, match="only the presets pathways, regulators"):
        write_known(simulate("tiny", cells=100), tmp_path / "d.gmt")


def test_wrong_sizes_and_names_are_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'pathways'"):
        simulate_programmes("pathway")
    with pytest.raises(UserError, match="too small"):
        simulate_programmes("pathways", genes=100)
