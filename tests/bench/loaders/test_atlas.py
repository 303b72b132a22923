from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest

from bgen.bench.loaders.atlas import CELLS_AT_ONCE, DISPERSION, EXPRESSED, Atlas, _factors

SMALL = Atlas(cells=600, genes=2000, batches=3, types=5, seed=1)


def test_a_cell_is_a_pure_function_of_seed_and_number() -> None:
    rows = np.array([7, 599, 0, 7])
    some, again = SMALL[rows], Atlas(cells=600, genes=2000, batches=3, types=5, seed=1)[np.arange(600)]
    assert (some != again[rows]).nnz == 0
    assert (some[0] != some[3]).nnz == 0
    assert (some != Atlas(cells=600, genes=2000, batches=3, types=5, seed=2)[rows]).nnz > 0
    assert some.has_sorted_indices
    assert some.data.min() >= 1


def test_counts_are_those_of_an_atlas(atlas: Atlas) -> None:
    counts = atlas[np.arange(0, 3000, 30)]
    assert counts.nnz / counts.shape[0] == pytest.approx(1636, rel=0.05)
    assert (counts.data == 1).mean() == pytest.approx(0.57, abs=0.02)
    assert (counts.data <= 15).mean() == pytest.approx(0.957, abs=0.01)
    assert (counts.data > 255).mean() == pytest.approx(0.0008, abs=0.0005)


def test_cells_express_the_wanted_share_of_the_genes_to_the_last_digits() -> None:
    weights = np.bincount(SMALL.cell_type, minlength=5) / 600
    zeros = [(DISPERSION / (DISPERSION + SMALL.means * factor)) ** DISPERSION for factor in _factors(6)]
    assert np.mean([weights @ (1 - zero).mean(1) for zero in zeros]) == pytest.approx(EXPRESSED, abs=1e-8)


def test_means_are_those_of_the_negative_binomial() -> None:
    atlas = Atlas(cells=20_000, genes=300, batches=2, types=2, seed=3)
    counts = atlas[np.arange(20_000)]
    of_type = atlas.cell_type == 0
    found = np.asarray(counts[of_type].mean(0)).ravel()
    expected = atlas.means[0] * atlas._library.mean()
    error = np.sqrt(expected * (1 + expected / 0.7 * 1.3) / of_type.sum())
    assert np.abs((found - expected) / np.maximum(error, 1e-9)).mean() < 1.2


def test_batches_are_contiguous_and_mix_types_differently() -> None:
    assert np.all(np.diff(SMALL.batch) >= 0)
    assert set(SMALL.batch) == {0, 1, 2}
    shares = [np.bincount(SMALL.cell_type[SMALL.batch == b], minlength=5) / (SMALL.batch == b).sum() for b in range(3)]
    assert np.abs(shares[0] - shares[1]).max() > 0.05


def test_h5ad_holds_the_atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgen.bench.loaders.atlas.CELLS_AT_ONCE", 250)
    assert CELLS_AT_ONCE > 250
    done = []
    SMALL.write_h5ad(tmp_path / "atlas.h5ad", lambda n, total: done.append((n, total)))
    read = anndata.read_h5ad(tmp_path / "atlas.h5ad")
    assert (SMALL[np.arange(600)] != read.X).nnz == 0
    assert read.obs["cell_type"].tolist() == [f"type{i:02d}" for i in SMALL.cell_type]
    assert done == [(250, 600), (500, 600), (600, 600)]
    assert [path.name for path in tmp_path.iterdir()] == ["atlas.h5ad"]
