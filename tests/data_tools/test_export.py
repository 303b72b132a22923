"""A store written in parts is what it is when written at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from bgen.order import groups
from bgen.store.store import Store
from data_tools.building.write import Contents, write_store
from data_tools.export import to_webdataset as webdataset
from data_tools.export.to_anndata import to_anndata


@pytest.mark.parametrize(
    ("split", "ending"),
    [
        *((None, "h5ad"), ("train", "zarr")),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("train", "h5ad"), (None, "zarr"))),
    ],
)
def test_in_parts_as_at_once(
    ending: str, split: str | None, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = contents if ending == "h5ad" else _without_slash(contents)
    write_store(tmp_path / "store", contents, profile="small", seed=0, created_by="test")
    store = Store(tmp_path / "store")
    seen: list[int] = []
    read = anndata.read_h5ad if ending == "h5ad" else anndata.read_zarr
    to_anndata(store, tmp_path / f"once.{ending}", split=split)
    monkeypatch.setattr(groups, "PART", 170)
    to_anndata(store, tmp_path / f"parts.{ending}", split=split, progress=lambda done, _: seen.append(done))
    once, parts = read(tmp_path / f"once.{ending}"), read(tmp_path / f"parts.{ending}")
    pd.testing.assert_frame_equal(parts.obs, once.obs)
    for name in ("indptr", "indices", "data"):
        assert np.array_equal(getattr(parts.X, name), getattr(once.X, name))
    assert np.array_equal(parts.obs_names, store.names(cells=np.arange(len(once))))
    assert seen[-1] == len(once)


def _without_slash(contents: Contents) -> Contents:
    return replace(contents, obs=contents.obs.drop(columns="a/b c"))


def test_samples_described_in_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    webdataset.to_webdataset(store, tmp_path / "once", blocks_per_shard=4)
    monkeypatch.setattr(webdataset, "DESCRIBED", 2)
    webdataset.to_webdataset(store, tmp_path / "parts", blocks_per_shard=4)
    shards = sorted(path.name for path in (tmp_path / "once/shards").iterdir())
    assert store.manifest.n_chunks > 2
    for name in shards:
        assert (tmp_path / "parts/shards" / name).read_bytes() == (tmp_path / "once/shards" / name).read_bytes()
