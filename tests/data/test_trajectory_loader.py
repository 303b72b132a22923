"""Batches of trajectories: the right cells on the right places, for any number of ranks."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from bgen.config.data import TrajectoriesConfig
from bgen.data.loader import CountReader
from bgen.data.trajectory_batch import TrajectoryBatch
from bgen.data.trajectory_loader import TrajectoryLoader, read_trajectories, valid_trajectories
from bgen.errors import UserError
from bgen.order.pools import PooledTrajectories
from bgen.store.open import open_store
from bgen.store.store import Store
from data_tools.export.to_anndata import to_anndata
from data_tools.export.to_webdataset import to_webdataset

SHAPE = TrajectoriesConfig(system=["cell_type"], times=4, cells=30)


def order(store: Store, batch: int = 4, split: str = "train") -> PooledTrajectories:
    about = read_trajectories(store, split, SHAPE), batch, SHAPE.times, SHAPE.cells, 0, "name"
    return PooledTrajectories(*about, lanes=8, pool=500, first_cell=store.first_cell)


def test_cells_stand_where_the_order_puts_them(store: Store) -> None:
    reader = CountReader(store, ["cell_type", "hours"])
    (batch,) = TrajectoryLoader(reader, order(store), seed=0, micro_batch=4).read(3)
    grids = order(store).read(3)
    assert isinstance(batch, TrajectoryBatch)
    assert len(batch) == 4 * SHAPE.size
    assert batch.cells.tolist() == [cell for grid in grids for cell in grid.cells.reshape(-1).tolist()]
    assert batch.mask.shape == (4, 4, 30)
    assert not batch.mask[:, 3].any()  # the store has three times
    alone = reader.read_cells(np.sort(batch.cells[:50].numpy()))
    ranked = batch.cells[:50].argsort(stable=True)
    assert torch.equal(batch.library[:50][ranked], alone.library)
    for i in (0, 17, 133):
        one = reader.read_cells(batch.cells[i : i + 1].numpy())
        part = slice(int(batch.indptr[i]), int(batch.indptr[i + 1]))
        assert torch.equal(batch.indices[part], one.indices)
        assert torch.equal(batch.counts[part], one.counts)
        assert batch.obs["hours"][i] == one.obs["hours"][0]
    time = batch.time[..., None].expand(batch.mask.shape)
    assert torch.equal(batch.obs["hours"].view(batch.mask.shape)[batch.mask], time[batch.mask])
    assert (batch.population_obs()["celltype"].view(4, 4)[:, :3] >= 0).all()
    assert len(set(batch.keys.tolist())) == len(batch)


def test_ranks_and_micro_batches_are_slices_of_the_same_batch(store: Store) -> None:
    reader = CountReader(store)
    (whole,) = next(TrajectoryLoader(reader, order(store), seed=0, micro_batch=4).steps(2))
    parts = [
        batch
        for rank in range(2)
        for batch in TrajectoryLoader(reader, order(store), seed=0, rank=rank, world=2, micro_batch=1).read(2)
    ]
    for name in ("cells", "keys", "counts", "mask", "time", "control", "slots"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def test_steps_go_on_anywhere_across_windows(store: Store) -> None:
    reader, ordered = CountReader(store), order(store)
    last = [run.window for run in ordered.runs(40)]
    assert min(last) > (0, 7, 0)  # all lanes have turned to other windows by then
    steps = TrajectoryLoader(reader, order(store), seed=0, micro_batch=4).steps(0)
    for step, (batch,) in zip(range(41), steps, strict=False):
        if step % 10 == 0:
            (alone,) = TrajectoryLoader(reader, ordered, seed=0, micro_batch=4).read(step)
            for name in ("cells", "keys", "indices", "counts", "mask", "time"):
                assert torch.equal(getattr(batch, name), getattr(alone, name)), name
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("bgen-loader", "bgen-pools"))]


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_chunk_is_read_once_a_window(ranks: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []
    read = store.read_chunks
    monkeypatch.setattr(store, "read_chunks", lambda some, *rest: chunks.extend(some.tolist()) or read(some, *rest))
    used = set()
    loader = TrajectoryLoader(CountReader(store), order(store), seed=0, micro_batch=1, rank=0, world=ranks)
    for step in range(3):
        used |= {run.window for run in loader.order.runs(step, 0, 4 // ranks)}
        loader.read(step)
    cells = np.unique(np.concatenate([loader.order.window(key).cells for key in used]))
    needed = np.unique(np.searchsorted(store.first_cell, cells, side="right") - 1)
    assert sorted(set(chunks)) == needed.tolist()
    assert len(chunks) <= len(needed) * len({key[::2] for key in used})


def test_held_out_trajectories_are_the_same_for_any_ranks(store: Store) -> None:
    def losses(world: int) -> dict[int, float]:
        found = {}
        for rank in range(world):
            batches = valid_trajectories(
                CountReader(store),
                order(store),
                seed=0,
                cells=5 * SHAPE.size + 7,
                micro_batch=2,
                rank=rank,
                world=world,
            )
            assert len({len(batch) for batch, _ in batches}) == 1
            for batch, weight in batches:
                for key, value in zip(batch.keys[weight > 0].tolist(), batch.library[weight > 0].tolist(), strict=True):
                    assert key not in found
                    found[key] = value
        return found

    assert len(losses(1)) == 5 * SHAPE.size
    assert losses(1) == losses(2) == losses(3)


def test_what_a_store_lacks_is_said(store: Store) -> None:
    with pytest.raises(UserError, match="no column or role 'donor'"):
        read_trajectories(store, "train", SHAPE.model_copy(update={"system": ["donor"]}))
    with pytest.raises(UserError, match="no column or role 'perturbation'"):
        read_trajectories(store, "train", SHAPE.model_copy(update={"along": "perturbation"}))


@pytest.mark.parametrize(
    ("store", "form"),
    [
        *(("small", "tar"), ("fast", "tar"), ("small", "anndata")),
        pytest.param("fast", "anndata", marks=pytest.mark.slow),
    ],
    indirect=["store"],
)
def test_other_forms_of_the_store_give_the_same_trajectories(form: str, store: Store, tmp_path: Path) -> None:
    if form == "tar":
        to_webdataset(store, tmp_path / "tars", blocks_per_shard=2)
        other = open_store(tmp_path / "tars")
    else:
        with pytest.raises(UserError, match=r"'/' in their name \(a/b c\)"):
            to_anndata(store, tmp_path / "cells.zarr")
        to_anndata(store, tmp_path / "cells.h5ad")
        adata = anndata.read_h5ad(tmp_path / "cells.h5ad")
        del adata.obs["a/b c"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's remarks on zarr versions
            adata.write_zarr(tmp_path / "cells.zarr")
        roles = {"time": "hours", "cell_type": "celltype"}
        other = open_store(tmp_path / "cells.zarr", roles=roles, splits={"train": 1.0})
    (found,) = TrajectoryLoader(CountReader(other, ["celltype"]), order(other), seed=0, micro_batch=4).read(3)
    truth = CountReader(other, ["celltype"]).read_cells(found.cells.numpy())
    assert found.indices.tolist() == truth.indices.tolist()
    assert found.counts.tolist() == truth.counts.tolist()
    assert found.obs["celltype"].tolist() == truth.obs["celltype"].tolist()
    if form == "tar":
        (same,) = TrajectoryLoader(CountReader(store, ["celltype"]), order(store), seed=0, micro_batch=4).read(3)
        assert found.cells.tolist() == same.cells.tolist()
        assert found.counts.tolist() == same.counts.tolist()
    times = other.column("time")[1][found.cells.numpy()].reshape(found.mask.shape)
    assert (times == found.time.numpy()[:, :, None])[found.mask.numpy()].all()
