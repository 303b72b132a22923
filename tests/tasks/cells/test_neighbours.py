"""Neighbours as scanpy keeps them: the weights by their definition, and scanpy itself where it is installed."""

from __future__ import annotations

import math
import warnings

import anndata
import numpy as np
import pytest

from bgen.errors import UserError
from bgen.tasks.cells.neighbours import add_neighbours, weights_of


@pytest.fixture
def cells() -> anndata.AnnData:
    points = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    points[40:43] = points[40]  # the same state thrice
    made = anndata.AnnData(shape=(90, 2))
    made.obsm["X_bgen"] = points
    return made


def test_weights_are_those_of_the_definition() -> None:
    distances = np.sort(np.random.default_rng(0).uniform(0.2, 3, (30, 7)), 1)
    distances[3, :2] = 0.0
    weights = weights_of(distances)
    np.testing.assert_allclose(weights.sum(1), math.log2(8))
    for d, w in zip(distances, weights, strict=True):
        nearest = min(one for one in d if one > 0)
        width = (d[-1] - nearest) / -math.log(w[-1])
        np.testing.assert_allclose(w, [math.exp(-max(one - nearest, 0) / width) for one in d])
    assert weights_of(np.zeros((3, 4))).tolist() == [[1.0] * 4] * 3


def test_they_are_the_nearest_of_each_cell(cells: anndata.AnnData) -> None:
    add_neighbours(cells, "X_bgen", 6)
    points = cells.obsm["X_bgen"].astype(float)
    straight = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(straight, np.inf)
    distances = cells.obsp["distances"]
    assert np.diff(distances.indptr).tolist() == [5] * 90
    assert distances.diagonal().tolist() == [0.0] * 90
    found = np.sort(distances.data.reshape(90, 5), 1)
    np.testing.assert_allclose(found, np.sort(straight, 1)[:, :5], atol=1e-6)
    edges = cells.obsp["connectivities"]
    assert abs(edges - edges.T).max() == 0
    assert 0 < edges.data.min() <= edges.data.max() <= 1
    assert cells.uns["neighbors"]["params"]["use_rep"] == "X_bgen"


@pytest.mark.parametrize("k", [1, 91])
def test_too_few_and_too_many_are_refused(cells: anndata.AnnData, k: int) -> None:
    with pytest.raises(UserError, match=f"from 2 to the 90 cells, not {k}"):
        add_neighbours(cells, "X_bgen", k)
    assert "neighbors" not in cells.uns


@pytest.mark.slow
def test_scanpy_goes_on_from_them(cells: anndata.AnnData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what scanpy imports
        scanpy = pytest.importorskip("scanpy")
        own = cells.copy()
        add_neighbours(cells, "X_bgen", 15)
        scanpy.pp.neighbors(own, n_neighbors=15, use_rep="X_bgen", transformer="sklearn")
        scanpy.tl.umap(cells)
        scanpy.tl.umap(own)
    assert cells.uns["neighbors"].keys() <= own.uns["neighbors"].keys()
    assert cells.uns["neighbors"]["params"].items() <= own.uns["neighbors"]["params"].items()
    for name in ("distances", "connectivities"):
        np.testing.assert_allclose(cells.obsp[name].toarray(), own.obsp[name].toarray(), atol=2e-3)
    assert cells.obsm["X_umap"].shape == (90, 2)
    assert np.isfinite(cells.obsm["X_umap"]).all()
