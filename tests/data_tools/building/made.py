"""Files of random counts, and how what is in a store is compared with what is in them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.data.loader import CountReader
from bgen.store.store import Store
from data_tools.building import pieces, shuffle
from data_tools.inputs import source as inputs

N_GENES = 700


def random_counts(n_cells: int, seed: int, n_genes: int = N_GENES) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    counts = sp.random(n_cells, n_genes, density=0.05, format="csr", rng=rng, dtype=np.float32)
    counts.data = np.ceil(rng.lognormal(1.0, 1.3, counts.nnz)).astype(np.float32)
    counts.data[rng.integers(0, counts.nnz, 40)] = rng.integers(250, 70_000, 40)
    counts = sp.hstack([np.ones((n_cells, 1), np.float32), counts[:, 1:]])  # no cell is empty
    return sp.csr_matrix(counts)


def write_h5ad(path: Path, counts: sp.spmatrix, first_gene: int = 0, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    n_cells, n_genes = counts.shape
    obs = pd.DataFrame(
        {
            "cell_type": rng.choice(["B", "T"], n_cells),
            "donor": rng.choice([f"D{i}" for i in range(6)], n_cells),
            "drug": rng.choice(["a", "b"], n_cells),
            "dish": rng.choice(["x", "y"], n_cells),
            "perturbation": rng.choice(["control", "G1", "G2", "G3"], n_cells),
            "time": rng.choice([0.0, 6.0, 48.0], n_cells),
        },
        index=[f"{path.stem}-{i}" for i in range(n_cells)],
    )
    order = rng.permutation(n_genes)  # each file has its own order of genes
    var = pd.DataFrame(index=[f"GENE{first_gene + i:011d}" for i in order])
    adata = anndata.AnnData(counts[:, order], obs=obs, var=var, uns={"organism": "synthetic", "time_unit": "hours"})
    adata.write_h5ad(path)
    return path


def contents_of(store: Store) -> pd.DataFrame:
    """(file, row, gene id) to count."""
    cells = np.arange(len(store))
    batch = CountReader(store).read_cells(cells)
    source, row = store.source_of(cells)
    owner = np.repeat(cells, np.diff(batch.indptr.numpy()))
    frame = pd.DataFrame({"source": source[owner], "row": row[owner]})
    frame["gene"] = store.genes["id"].to_numpy()[batch.indices.numpy()]
    frame["count"] = batch.counts.numpy()
    return frame.sort_values(["source", "row", "gene"]).reset_index(drop=True)


def contents_of_files(files: list[Path]) -> pd.DataFrame:
    frames = []
    for number, path in enumerate(files):
        adata = anndata.read_h5ad(path)
        x = sp.coo_matrix(adata.X)
        frames.append(
            pd.DataFrame(
                {
                    "source": np.int32(number),
                    "row": x.row.astype(np.int64),
                    "gene": adata.var_names[x.col],
                    "count": x.data,
                }
            )
        )
    return pd.concat(frames).sort_values(["source", "row", "gene"]).reset_index(drop=True)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_frames(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    return all(np.array_equal(a[name].to_numpy(), b[name].to_numpy()) for name in ("source", "row", "count")) and (
        a["gene"].astype(str).tolist() == b["gene"].astype(str).tolist()
    )


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_VALUES", 4000)
    monkeypatch.setattr(inputs, "CSC_VALUES", 3000)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 7000)
    monkeypatch.setattr(shuffle, "SHARD_CHUNKS", 2)
