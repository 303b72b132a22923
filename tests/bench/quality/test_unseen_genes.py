"""``bgen bench genes``: genes withheld from training, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from bgen.bench.quality.unseen_genes import CELLS, LEVEL, SHUFFLED, VECTORS, UnseenGenes, bench_genes
from bgen.errors import UserError


def screen_of_programs(folder: Path) -> tuple[Path, Path]:
    """Cells whose genes go up and down in three programs, and vectors that say which gene is in which, and how high."""
    rng = np.random.default_rng(0)
    genes, cells = 240, 500
    program, level = rng.integers(0, 3, genes), rng.normal(0, 1, genes)
    state = rng.normal(0, 1, (cells, 3))
    rate = np.exp(level + state[:, program])
    counts = rng.poisson(2000 * rate / rate.sum(1, keepdims=True)).astype(np.float32)
    names = [f"gene-{i}" for i in range(genes)]
    AnnData(counts, var=pd.DataFrame(index=names), uns={"organism": "synthetic"}).write_h5ad(folder / "cells.h5ad")
    vectors = np.column_stack([np.eye(3)[program], level])
    pd.DataFrame(vectors, index=names).to_csv(folder / "vectors.csv")
    return folder / "cells.h5ad", folder / "vectors.csv"


@pytest.mark.slow
def test_what_vectors_tell_is_found_and_shuffled_ones_tell_nothing(bgen: Any, tmp_path: Path) -> None:
    cells, vectors = screen_of_programs(tmp_path)
    given = ["--vectors", vectors, "--genes", 240, "--size", 4, "--seeds", 1, "--steps", 150, "--out", tmp_path / "out"]
    small = ["vae.latent=4", "vae.hidden=32", "vae.blocks=1", "train.global_batch=128", "train.learning_rate=5e-3"]
    done = bgen("bench", "genes", cells, *given, *small)
    assert done.code == 0, done
    told = json.loads((tmp_path / "out" / "genes.json").read_text(encoding="utf-8"))
    (real,), (other,) = told["runs"][VECTORS], told["runs"][SHUFFLED]
    assert real[LEVEL] > 0.7
    assert real[CELLS] > 0.4
    assert other[LEVEL] < 0.2
    assert abs(other[CELLS]) < 0.2
    assert real["genes"] == other["genes"] == 48
    assert not (tmp_path / "out" / "run").exists()


def test_what_is_said_stands_beside_the_control() -> None:
    runs = {VECTORS: [{LEVEL: 0.4, CELLS: 0.2}, {LEVEL: 0.3, CELLS: 0.2}], SHUFFLED: [{LEVEL: 0.0, CELLS: 0.0}] * 2}
    found = UnseenGenes({"data": "x"}, runs)
    assert found.sentences()[0] == (
        "Genes never seen, R2 of the log mean: 0.350 (sd 0.071 over 2 splits); with vectors shuffled 0.000."
    )


def test_without_anything_that_is_known_it_is_refused(tmp_path: Path) -> None:
    anndata.AnnData(np.ones((3, 3), np.float32)).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(UserError, match="needs what is known of genes: --vectors or --sets"):
        bench_genes(tmp_path / "cells.h5ad", tmp_path / "out", say=print)
