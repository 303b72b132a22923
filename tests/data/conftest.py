from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.store.format.manifest import Source
from bgen.store.store import Store
from data_tools.building.splits import DEFAULT, assign
from data_tools.building.write import Contents, write_store

sys.path.insert(0, str(Path(__file__).parent))  # for servers.py


def make_contents(n_cells: int = 1500, n_genes: int = 900, seed: int = 0) -> Contents:
    """Random counts with what the codec must get right: long gaps, counts of 255 and more, an empty last gene."""
    rng = np.random.default_rng(seed)
    counts = sp.random(n_cells, n_genes, density=0.04, format="csr", rng=rng, dtype=np.float64)
    counts.data = np.ceil(rng.lognormal(1.0, 1.5, counts.nnz))
    counts.data[rng.integers(0, counts.nnz, 300)] = rng.integers(250, 70_000, 300)
    counts = sp.csr_matrix(counts)
    counts = sp.hstack([counts[:, :-1], sp.csr_matrix((n_cells, 1))], format="csr")  # a gene that no cell expresses
    obs = pd.DataFrame(
        {
            "celltype": rng.choice(["B", "T", "NK"], n_cells),
            "hours": rng.choice([0.0, 6.0, 12.5], n_cells),
            "a/b c": rng.choice([True, False], n_cells),
            "dose": np.where(rng.random(n_cells) < 0.1, np.nan, 0.1),
            "barcode": [f"cell{i}" for i in range(n_cells)],
        },
        index=[f"AAC-{i}é" for i in range(n_cells)],
    )
    return Contents(
        counts=counts,
        genes=pd.DataFrame(
            {"id": [f"ENSG{i:05d}" for i in range(n_genes)], "symbol": [f"S{i}" for i in range(n_genes)]}
        ),
        obs=obs,
        split=assign(DEFAULT, None, n_cells, seed),
        splits=list(DEFAULT),
        source=np.zeros(n_cells, np.int32),
        row=np.arange(n_cells),
        sources=[Source(name="x.h5ad", bytes=1, cells=n_cells, kept=n_cells, matrix="X")],
        organism="synthetic",
        roles={"cell_type": "celltype", "time": "hours", "population": "celltype"},
    )


@pytest.fixture(scope="session")
def contents() -> Contents:
    return make_contents()


@pytest.fixture(scope="session", params=["small", "fast"])
def store(request: pytest.FixtureRequest, contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("stores") / request.param
    write_store(folder, contents, profile=request.param, seed=0, created_by="test")
    return Store(folder)
