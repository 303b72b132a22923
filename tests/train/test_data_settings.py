"""What the section `data` of a configuration says, from the command line: sources, splits, damage."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch

from bgen.config.load import load_config
from bgen.data.loader import CountReader, valid_batches
from bgen.distributed.world import World
from bgen.errors import UserError
from bgen.order import pools
from bgen.store.format.manifest import hash_folder, read_manifest
from bgen.store.open import open_data
from bgen.store.store import Store
from bgen.train.stages import trajectories_from_store
from bgen.train.stages.from_store import StoreStage
from bgen.train.stages.registry import make_stage
from bgen.train.trainer import Trainer, check
from data_tools.building.write import Contents, write_array, write_store

SHORT = ["train.steps=8", "train.global_batch=64", "train.log_every=1", "train.eval_every=0", "train.patience=0"]
QUIET = ["track.mlflow=false", "track.progress=false"]


def train(bgen: Any, out: Path, store: Path, *settings: str) -> Any:
    return bgen("train", "demo/vae", f"out={out}", f"data.store={store}", *SHORT, *QUIET, *settings)


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "record.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def test_a_damaged_chunk_stops_the_run_or_is_skipped_and_counted(bgen: Any, demo: Any, tmp_path: Path) -> None:
    store = Path(shutil.copytree(demo.store, tmp_path / "store"))
    shard = store / "counts/c/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    stopped = train(bgen, tmp_path / "stopped", store)
    assert stopped.code == 2
    assert "counts/c/0/0" in stopped.err
    skipped = train(bgen, tmp_path / "skipped", store, "data.on_damage=skip")
    assert skipped.code == 0, skipped.err
    assert "chunk 0 is skipped: " in skipped.err
    steps = rows(tmp_path / "skipped", "train")
    counted = [row.get("damaged_cells", 0) for row in steps]
    assert counted == sorted(counted)
    first = Store(store).first_cell[1]
    assert 0 < counted[-1] <= first + 64 * 16  # steps, those read ahead, and the start of the decoder
    assert [row["chunk"] for row in rows(tmp_path / "skipped", "event") if row["event"] == "damaged chunk"] == [0]


def test_cells_in_two_splits_stop_the_run_before_its_first_step(bgen: Any, demo: Any, tmp_path: Path) -> None:
    store = Path(shutil.copytree(demo.store, tmp_path / "store"))
    source, row = Store(store).source_of(np.arange(len(Store(store))))
    assert len(np.unique(source)) == 1
    row[0] = row[1]  # the same row of the input twice
    shutil.rmtree(store / "origin/row")
    write_array(store / "origin/row", row)
    manifest = read_manifest(store)
    changed = manifest.model_copy(update={"files": hash_folder(store)}).with_fingerprint()
    (store / "manifest.json").write_text(changed.model_dump_json())
    refused = train(bgen, tmp_path / "run", store)
    assert refused.code == 2
    assert "rows of the inputs are in" in refused.err
    assert not (tmp_path / "run").exists()
    same = train(bgen, tmp_path / "run", demo.store, "data.valid=train")
    assert same.code == 2
    assert "data: valid" in same.err


def test_sources_by_weight_and_no_resume_with_another_weight(bgen: Any, demo: Any, tmp_path: Path) -> None:
    run, weight = tmp_path / "run", "data.weighting.temperature=5"
    by = "data.weighting.by=cell_type"
    assert train(bgen, run, demo.store, weight, by).code == 0
    assert train(bgen, tmp_path / "plain", demo.store).code == 0
    losses, plain = ([row["loss"] for row in rows(place, "train")] for place in (run, tmp_path / "plain"))
    assert losses != plain
    other = bgen("train", "demo/vae", f"out={run}", f"data.store={demo.store}", *SHORT, *QUIET, "--resume")
    assert other.code == 2
    assert "weighting" in other.err
    wrong = train(bgen, tmp_path / "wrong", demo.store, weight, "data.weighting.by=time")
    assert wrong.code == 2
    assert "Sources are categories" in wrong.err


def test_anndata_in_zarr_with_roles_and_splits_of_the_configuration(bgen: Any, demo: Any, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(demo.cells)
    adata.layers["counts"] = adata.X.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's remark on zarr versions
        adata.write_zarr(tmp_path / "cells.zarr")
    given = [
        "data.anndata.matrix=layers/counts",
        "data.anndata.roles={batch: batch, perturbation: perturbation}",
        "data.anndata.control=control",
        "data.anndata.split_by=cell_type",
        "data.anndata.held_out={test: [" + str(adata.obs["cell_type"].iloc[0]) + "]}",
        "data.threads=1",
    ]
    made = train(bgen, tmp_path / "run", tmp_path / "cells.zarr", *given)
    assert made.code == 0, made.err
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["about"]["roles"] == {"batch": "batch", "perturbation": "perturbation"}
    refused = train(bgen, tmp_path / "other", tmp_path / "cells.zarr", "data.anndata.roles={batch: bacth}")
    assert refused.code == 2
    assert "'bacth'" in refused.err


def test_values_are_held_out_by_name_and_tar_shards_are_verified(bgen: Any, demo: Any, tmp_path: Path) -> None:
    times = anndata.read_h5ad(demo.cells).obs["time"]
    last = f"{times.max():g}"
    made = bgen(
        "data", "build", demo.cells, "--out", tmp_path / "store", "--split-by", "time", "--hold-out", f"test={last}"
    )
    assert made.code == 0, made.err
    store = Store(tmp_path / "store")
    assert set(store.column("time")[1][store.cells_of_split("test")]) == {times.max()}
    assert times.max() not in store.column("time")[1][store.cells_of_split("train")]
    wrong = bgen("data", "build", demo.cells, "--out", tmp_path / "no", "--split-by", "time", "--hold-out", "test")
    assert wrong.code == 2
    assert "test=48,72" in wrong.err
    shards = tmp_path / "shards"
    assert bgen("data", "to-webdataset", tmp_path / "store", "--out", shards).code == 0
    assert bgen("data", "verify", shards).code == 0
    tar = next(shards.rglob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[-2000] ^= 1
    tar.write_bytes(data)
    damaged = bgen("data", "verify", shards)
    assert damaged.code == 2
    assert tar.name in damaged.err


def test_packed_batches_train_like_unpacked_ones(demo: Any, tmp_path: Path) -> None:
    """What a GPU gets is moved packed and unpacked there; that its unpacking is right is shown in tests/data."""
    losses = []
    for packed in (False, True):
        out = tmp_path / f"packed{packed}"
        config = load_config("demo/vae", [f"out={out}", f"data.store={demo.store}", *SHORT, *QUIET])
        stage = make_stage(config, open_data(config.data), check(config))
        stage.packed = packed
        losses.append(Trainer(config, stage).fit().losses)
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


def test_populations_that_lie_far_apart_are_said_before_the_first_step(
    contents: Contents, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The few cells of a population stand in as many chunks, or side by side."""
    monkeypatch.setattr(pools, "DRAWS", (1,))  # in a store of this size many draws would make up for it
    rng = np.random.default_rng(0)
    population = rng.permutation(np.repeat(np.arange(200), len(contents.obs) // 200 + 1)[: len(contents.obs)])
    obs = contents.obs.assign(clone=[f"c{i}" for i in population])
    for name, roles in (("apart", {}), ("together", {"population": "clone"})):
        made = replace(contents, obs=obs, roles=contents.roles | roles)
        write_store(tmp_path / name, made, profile="small", seed=0, created_by="test")

    def start(name: str) -> tuple[str, float]:
        trajectories = "data.trajectories={system: [clone], times: 2, cells: 2, pool: 32}"
        settings = f"data.store={tmp_path / name}", "train.global_batch=16", "train.micro_batch=16", trajectories
        config = load_config(
            "demo/flow", [*settings, f"out={tmp_path / 'run'}", "flow.vae=none", "flow.fit_levels=false"]
        )
        stage = StoreStage(config, open_data(config.data), World(0, 1, 0, 1, torch.device("cpu")), [])
        assert stage.trajectories is not None
        return capsys.readouterr().err, stage.trajectories.order.decoded

    said, decoded = start("apart")
    assert f"does not hold populations together: training decodes about {decoded:.0f} cells" in said
    assert "--population COLUMN" in said
    monkeypatch.setattr(trajectories_from_store, "FAR_APART", decoded - 1)
    assert start("apart")[0]
    said, nearer = start("together")
    assert nearer < decoded - 1
    assert said == ""


def test_an_empty_held_out_split_and_too_few_lanes_are_said_before_the_first_step(
    contents: Contents, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, codes in (("good", contents.split), ("empty", np.zeros(len(contents.split), np.uint8))):
        write_store(tmp_path / name, replace(contents, split=codes), profile="small", seed=0, created_by="test")

    def start(name: str, size: int, *settings: str) -> None:
        settings = (f"data.store={tmp_path / name}", "train.global_batch=256", f"out={tmp_path / 'run'}", *settings)
        config = load_config("demo/vae", settings)
        StoreStage(config, open_data(config.data), World(0, size, 0, size, torch.device("cpu")), [])

    start("good", 8)
    assert capsys.readouterr().err == ""
    start("good", 64)
    assert "64 ranks share data.lanes=8 lanes, so that each chunk is read about 8 times" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"The split 'valid' of .*empty holds no cells: choose another data\.valid"):
        start("empty", 1)
    start("empty", 1, "train.eval_every=0")
    with pytest.raises(UserError, match="holds no cells"):
        valid_batches(CountReader(Store(tmp_path / "empty")), "valid", seed=0, cells=10, micro_batch=4)
