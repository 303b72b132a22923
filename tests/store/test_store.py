from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from bgen.data import loader
from bgen.data.as_anndata import read_split
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader, TrainLoader, valid_batches
from bgen.errors import UserError
from bgen.store.store import Store
from data_tools.building.write import Contents


def as_matrix(batch: CellBatch) -> sp.csr_matrix:
    return sp.csr_matrix(
        (batch.counts.numpy(), batch.indices.numpy(), batch.indptr.numpy()), shape=(len(batch), batch.n_genes)
    )


def expected(store: Store, contents: Contents, cells: np.ndarray) -> sp.csr_matrix:
    """The same cells, straight from what was written."""
    _, rows = store.source_of(cells)
    genes = np.array([int(gene[4:]) for gene in store.genes["id"]])
    return contents.counts[rows][:, genes]


def same(a: sp.csr_matrix, b: sp.csr_matrix) -> bool:
    return a.shape == b.shape and abs(a - b).nnz == 0


def test_every_count_comes_back(store: Store, contents: Contents) -> None:
    cells = np.arange(len(store))
    batch = CountReader(store).read_cells(cells)
    assert same(as_matrix(batch), expected(store, contents, cells))
    assert batch.counts.max() > 60_000
    assert len(store.first_cell) - 1 >= 5
    assert np.array_equal(batch.library.numpy(), np.asarray(as_matrix(batch).sum(1)).ravel())


def test_any_cells_in_any_order(store: Store, contents: Contents) -> None:
    cells = np.random.default_rng(1).permutation(len(store))[:333]
    assert same(as_matrix(CountReader(store).read_cells(cells)), expected(store, contents, cells))


def test_scattered_cells_are_read_a_few_chunks_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = np.random.default_rng(2).integers(0, len(store), 400)  # in any order, some twice
    keys = np.arange(400).astype(np.uint64)
    reader = CountReader(store, ["cell_type", "time"])
    whole = reader.read_cells(cells, keys, step=3)
    taken: list[int] = []
    arena = store.arena
    monkeypatch.setattr(loader, "TOGETHER", 2)
    monkeypatch.setattr(store, "arena", lambda slots: taken.append(slots) or arena(slots))
    parts = reader.read_cells(cells, keys, step=3)
    assert max(taken) == 2 < len(store.first_cell) - 1
    for name in ("indptr", "indices", "counts", "keys", "cells"):
        assert getattr(parts, name).equal(getattr(whole, name)), name
    assert all(parts.obs[name].equal(column) for name, column in whole.obs.items())
    assert (parts.step, parts.n_genes, len(parts)) == (3, whole.n_genes, 400)


def test_obs_genes_names_and_splits(store: Store, contents: Contents) -> None:
    _, rows = store.source_of(np.arange(len(store)))
    assert sorted(rows) == list(range(len(contents.obs)))
    column, codes = store.column("cell_type")
    assert [column.categories[code] for code in codes] == contents.obs["celltype"].iloc[rows].tolist()
    assert store.column("a/b c")[0].categories == ["False", "True"]
    assert np.array_equal(store.column("time")[1], contents.obs["hours"].to_numpy()[rows])
    assert np.array_equal(store.column("dose")[1], contents.obs["dose"].to_numpy()[rows], equal_nan=True)
    assert store.names().tolist() == contents.obs.index[rows].tolist()
    assert store.genes["cells"].is_monotonic_decreasing
    assert store.genes["symbol"].tolist() == ["S" + str(int(gene[4:])) for gene in store.genes["id"]]
    parts = [store.cells_of_split(split) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [1200, 150, 150]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(store)))
    for part, code in zip(parts, range(3), strict=True):
        assert set(contents.split[rows[part]]) == {code}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_batches_are_those_of_the_order(store: Store, contents: Contents, world: int) -> None:
    order = store.order("train", batch=96, lanes=4, window=2, seed=5)
    reader = CountReader(store, ["cell_type", "time"])
    loaders = [TrainLoader(reader, order, seed=5, rank=rank, world=world, micro_batch=16) for rank in range(world)]
    streams = [loader.steps(7) for loader in loaders]
    keys = []
    for step in range(7, 40):
        batches = [batch for stream in streams for batch in next(stream)]
        cells = np.concatenate([batch.cells.numpy() for batch in batches])
        assert np.array_equal(cells, order.cells(step))
        assert all(batch.step == step and len(batch) == 16 for batch in batches)
        got = sp.vstack([as_matrix(batch) for batch in batches])
        assert same(sp.csr_matrix(got), expected(store, contents, cells))
        codes = np.concatenate([batch.obs["celltype"].numpy() for batch in batches])
        assert np.array_equal(codes, store.column("cell_type")[1][cells])
        keys.append(np.concatenate([batch.keys.numpy() for batch in batches]))
    assert len(np.unique(keys)) == 33 * 96
    for stream in streams:
        stream.close()
    again = TrainLoader(reader, order, seed=5).read(39)[0]
    assert np.array_equal(again.keys.numpy(), keys[-1])


@pytest.mark.parametrize("world", [1, 2])
def test_validation_covers_every_cell_once(store: Store, world: int) -> None:
    seen = []
    for rank in range(world):
        share = valid_batches(CountReader(store), "valid", seed=0, cells=1000, micro_batch=32, rank=rank, world=world)
        assert len(share) == -(-150 // (32 * world))
        for batch, weight in share:
            assert len(batch) == 32
            seen += batch.cells[weight > 0].tolist()
    assert sorted(seen) == store.cells_of_split("valid").tolist()


def test_unknown_names_are_explained(store: Store) -> None:
    with pytest.raises(UserError, match="Did you mean 'celltype'"):
        store.column("celltyp")
    with pytest.raises(UserError, match=r"no split 'tests'.*'test'"):
        store.cells_of_split("tests")


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.folder, tmp_path / "copy"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("stream", ["gaps", "counts"])
def test_a_flipped_byte_is_found_and_named(copy: Path, stream: str) -> None:
    flip(copy / stream / "c/0/0", 1000)
    damaged = Store(copy)  # sizes agree: it opens
    with pytest.raises(UserError, match=stream):
        CountReader(damaged).read_cells(np.arange(len(damaged)))
    order = damaged.order("train", batch=300, lanes=2, window=2, seed=0)
    with pytest.raises(UserError, match=stream):
        for _ in zip(range(8), TrainLoader(CountReader(damaged), order, seed=0).steps(), strict=False):
            pass


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "rows/genes/c/0", 20), "rows/genes"),
        (lambda f: (f / "gaps/c/0/0").unlink(), "gaps/c/0/0 is missing"),
        (lambda f: (f / "counts/c/0/0").write_bytes(b"short"), "counts/c/0/0 has 5 bytes"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "manifest.json").write_text("{}"), "damaged"),
        (lambda f: edit(f, "n_genes", 3), "was changed"),
        (lambda f: edit(f, "version", 9), "version 9"),
        (shutil.rmtree, "no store"),
    ],
)
def test_damage_is_found_on_opening(copy: Path, damage, message: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message):
        Store(copy)


def edit(folder: Path, key: str, value: object) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    tree[key] = value
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_cells_become_anndata(store: Store, contents: Contents) -> None:
    cells = store.cells_of_split("test")
    adata = read_split(store, "test")
    _, rows = store.source_of(cells)
    assert same(adata.X, expected(store, contents, cells))
    assert adata.obs["celltype"].tolist() == contents.obs["celltype"].iloc[rows].tolist()
    assert adata.obs_names.tolist() == contents.obs.index[rows].tolist()
    assert adata.var_names.tolist() == store.genes["id"].tolist()
    assert adata.uns["bgen"]["roles"]["cell_type"] == "celltype"
    assert read_split(store, "train", limit=70, seed=1).n_obs == 70
