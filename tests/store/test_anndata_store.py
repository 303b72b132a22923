"""AnnData in zarr is trained from as it is: the order, the resume and the batches of a store."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from bgen.data.loader import CountReader, TrainLoader, valid_batches
from bgen.data.skip_damage import SkippingReader
from bgen.errors import UserError
from bgen.store.anndata_store import CsrStore
from bgen.store.open import open_store

N_GENES = 900


def make_adata(n_cells: int, seed: int) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    counts = sp.random(n_cells, N_GENES, density=0.04, format="csr", rng=rng, dtype=np.float32)
    counts.data = np.ceil(rng.lognormal(1.0, 1.5, counts.nnz)).astype(np.float32)
    counts.data[rng.integers(0, counts.nnz, 100)] = rng.integers(250, 70_000, 100)
    counts.data[7] = 0.0  # a stored zero
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["a", "b", "c"], n_cells)),
            "donor": rng.choice([f"D{i}" for i in range(5)], n_cells),
            "time": rng.choice([0.0, 2.5], n_cells),
        },
        index=[f"cell{seed}-{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(N_GENES)]}, index=[f"GENE{i:05d}" for i in range(N_GENES)])
    return anndata.AnnData(counts, obs=obs, var=var)


def write(adata: anndata.AnnData, path: Path, version: int = 3, sharded: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what will be the default, and that consolidated metadata are not yet standard
        anndata.io.write_elem(zarr.open_group(path, mode="w", zarr_format=version), "/", adata)  # type: ignore[arg-type]
        if sharded:
            group = zarr.open_group(path, mode="a")["X"]
            for part in ("data", "indices"):
                values = group[part][:]
                del group[part]
                group.create_array(part, data=values, chunks=(2000,), shards=(20_000,))
        zarr.consolidate_metadata(path)
    return path


def as_matrix(batch: object) -> sp.csr_matrix:
    return sp.csr_matrix(
        (batch.counts.numpy(), batch.indices.numpy(), batch.indptr.numpy()),  # type: ignore[attr-defined]
        shape=(len(batch), N_GENES),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def adatas() -> list[anndata.AnnData]:
    return [make_adata(1100, 0), make_adata(700, 1), make_adata(450, 2)]


@pytest.fixture(scope="module", params=["v2", pytest.param("v3", marks=pytest.mark.slow), "sharded"])
def folder(request: pytest.FixtureRequest, adatas: list[anndata.AnnData], tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zarr") / "collection"
    zarr.open_group(folder, mode="w")
    for number, adata in enumerate(adatas):
        write(adata, folder / f"dataset_{number}", 2 if request.param == "v2" else 3, request.param == "sharded")
    return folder


def whole(adatas: list[anndata.AnnData]) -> sp.csr_matrix:
    matrix = sp.vstack([adata.X for adata in adatas], format="csr")
    matrix.eliminate_zeros()
    return matrix


def test_every_count_comes_back(folder: Path, adatas: list[anndata.AnnData]) -> None:
    store = open_store(folder, roles={"cell_type": "cell_type"})
    assert isinstance(store, CsrStore)
    cells = np.random.default_rng(0).permutation(len(store))
    reader = CountReader(store, ["cell_type", "time"])
    batch = reader.read_cells(cells)
    wanted = whole(adatas)[cells]
    assert abs(as_matrix(batch) - wanted).nnz == 0
    assert batch.indptr.diff().tolist() == np.diff(wanted.indptr).tolist()
    obs = pd.concat([adata.obs for adata in adatas])
    assert batch.obs["time"].tolist() == obs["time"].to_numpy()[cells].tolist()
    column = store.column("cell_type")[0]
    assert [column.categories[i] for i in batch.obs["cell_type"]] == obs["cell_type"].astype(str).to_numpy()[
        cells
    ].tolist()
    assert store.names().tolist() == obs.index.tolist()
    assert store.genes["id"].tolist() == adatas[0].var_names.tolist()
    source, row = store.source_of(np.array([0, 1099, 1100, 2249]))
    assert (source.tolist(), row.tolist()) == ([0, 0, 1, 2], [0, 1099, 0, 449])


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_training_batches_are_those_of_the_order(folder: Path, adatas: list[anndata.AnnData], world: int) -> None:
    store = open_store(folder)
    matrix = whole(adatas)
    order = store.order("train", batch=96, lanes=4, window=2, seed=5)
    reader = CountReader(store)
    loaders = [TrainLoader(reader, order, seed=5, rank=rank, world=world, micro_batch=16) for rank in range(world)]
    streams = [loader.steps(7) for loader in loaders]
    for step in range(7, 60):
        batches = [batch for stream in streams for batch in next(stream)]
        cells = np.concatenate([batch.cells.numpy() for batch in batches])
        assert np.array_equal(cells, order.cells(step))
        assert abs(sp.vstack([as_matrix(batch) for batch in batches]) - matrix[cells]).nnz == 0
    for stream in streams:
        stream.close()
    seen = [cell for batch, weight in valid_batches(reader, "valid", seed=0, cells=10**6, micro_batch=32)
            for cell in batch.cells[weight > 0].tolist()]  # fmt: skip
    assert sorted(seen) == store.cells_of_split("valid").tolist()


def test_splits_and_fingerprint(folder: Path, tmp_path: Path) -> None:
    store = open_store(folder, split_by="donor", seed=1)
    splits = [set(store.column("donor")[1][store.cells_of_split(name)]) for name in ("train", "valid", "test")]
    assert sum(map(len, splits)) == 5
    assert open_store(folder, split_by="donor", seed=1).fingerprint == store.fingerprint
    assert open_store(folder, seed=1).fingerprint != store.fingerprint
    copy = Path(shutil.copytree(folder, tmp_path / "collection"))
    assert open_store(copy, split_by="donor", seed=1).fingerprint == store.fingerprint
    held = open_store(folder, split_by="time", held_out={"test": ["2.5"]})
    assert set(held.column("time")[1][held.cells_of_split("test")]) == {2.5}
    with pytest.raises(UserError, match="no column 'kind' for the role cell_type"):
        open_store(folder, roles={"cell_type": "kind"})
    with pytest.raises(UserError, match="no column or role 'patient'"):
        open_store(folder, split_by="patient")
    with pytest.raises(UserError, match="no split 'train2'"):
        held.cells_of_split("train2")


def test_what_is_no_counts_is_said(tmp_path: Path) -> None:
    adata = make_adata(300, 0)
    adata.X.data[:] = np.where(adata.X.data == 3, 0.5, adata.X.data)
    with pytest.raises(UserError, match="values that are no counts, in rows 0 to"):
        CountReader(open_store(write(adata, tmp_path / "a.zarr"))).read_cells(np.arange(3))
    adata.X = adata.X.tocsc()
    with pytest.raises(UserError, match=r"X is a csc_matrix.*bgen data build"):
        open_store(write(adata, tmp_path / "b.zarr"))
    with pytest.raises(UserError, match="with a matrix layers/counts"):
        open_store(tmp_path / "a.zarr", matrix="layers/counts")
    zarr.open_group(tmp_path / "mixed", mode="w")
    write(make_adata(30, 0), tmp_path / "mixed/dataset_0")
    write(make_adata(30, 1)[:, ::-1].copy(), tmp_path / "mixed/dataset_1")
    with pytest.raises(UserError, match=r"dataset_1 does not have the genes of .*dataset_0"):
        open_store(tmp_path / "mixed")
    with pytest.raises(UserError, match="no store"):
        open_store(tmp_path / "nowhere")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(make_adata(2000, 0), tmp_path / "a.zarr", 3, sharded=True)
    store = open_store(path)
    shard = path / "X/data/c/1"
    data = bytearray(shard.read_bytes())
    data[300:320] = bytes(20)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"X/data"):
        CountReader(store).read_cells(np.arange(2000))
    reader = SkippingReader(store)
    order = store.order("train", batch=200, lanes=2, window=4, seed=0)
    batch = TrainLoader(reader, order, seed=0).read(0)[0]
    assert len(batch) == 200
    for step in range(1, 8):
        TrainLoader(reader, order, seed=0).read(step)
    assert len(reader.skipped) >= 1
    shard.unlink()
    with pytest.raises(UserError, match=r"1 file.* of 'data' are missing, the first is c/1"):
        open_store(path)


@pytest.mark.parametrize("version", [2, 3])
def test_texts_take_the_memory_that_their_bytes_explain(version: int, tmp_path: Path) -> None:
    path = write(make_adata(60, 0), tmp_path / "a.zarr", version)
    group: Any = zarr.open_group(path, mode="r", use_consolidated=False)
    name = (
        "obs/_index" if isinstance(group["obs/_index"], zarr.Array) else "obs/_index/values"
    )  # as anndata 0.13 has it
    texts, attributes = group[name][...], dict(group[name].attrs)
    where = path / name
    made = zarr.create_array(where, shape=(60,), dtype=str, compressors=None, zarr_format=version, overwrite=True)  # type: ignore[arg-type]
    made[...] = texts
    made.attrs.update(attributes)
    (path / ".zmetadata").unlink(missing_ok=True)
    if version == 3:
        root = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        del root["consolidated_metadata"]
        (path / "zarr.json").write_text(json.dumps(root), encoding="utf-8")
    open_store(path)
    (chunk,) = (file for file in where.rglob("*") if file.name == "0")
    chunk.write_bytes((1 << 30).to_bytes(4, "little") + chunk.read_bytes()[4:])
    with pytest.raises(UserError, match="says that it holds 1,073,741,824 texts"):
        open_store(path)
