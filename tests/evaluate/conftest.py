"""Small populations with two cell types and two gene programmes inside each, which a per-type baseline cannot know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

GENES = 60
Draw = Callable[[int, int], AnnData]


@pytest.fixture
def draw() -> Draw:
    """draw(seed, cells): independent cells of one fixed distribution."""
    world = np.random.default_rng(0)
    rates = world.gamma(0.6, 1.5, size=(2, GENES))
    loadings = world.normal(0, 0.9, size=(2, 2, GENES))

    def draw_cells(seed: int, cells: int) -> AnnData:
        rng = np.random.default_rng(seed)
        kind = (rng.random(cells) < 0.4).astype(int)
        programme = np.einsum("cp,cpg->cg", rng.normal(size=(cells, 2)), loadings[kind])
        rate = rates[kind] * np.exp(programme - 0.8) * rng.lognormal(0.5, 0.4, size=(cells, 1))
        obs = pd.DataFrame({"kind": np.array(["T cell", "B cell"])[kind]}, index=[f"c{seed}_{i}" for i in range(cells)])
        var = pd.DataFrame(index=[f"g{i}" for i in range(GENES)])
        return AnnData(X=sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)

    return draw_cells


@pytest.fixture(scope="session")
def pbmc() -> AnnData:
    """Sorted blood cells, 3,774 x 16,791."""
    folder = Path(os.environ.get("BGEN_REAL_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    path = folder / "pbmc_facs_3774x16791.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not there; set BGEN_REAL_DATA to the folder with the real data")
    return anndata.read_h5ad(path)
