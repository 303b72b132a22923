"""A store from elsewhere may hold anything: it is read, or refused with one message. It never leads a loop astray."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forging import edit_json, get_array, put_array, put_chunk, put_shard, sign
from servers import serve

from bgen.config.data import Access
from bgen.data.as_anndata import read_anndata
from bgen.data.loader import CountReader
from bgen.errors import UserError
from bgen.store.format.columns import obs_path
from bgen.store.open import open_store
from bgen.store.store import Store
from bgen.store.webdataset_store import INDEX
from data_tools.building.write import Contents, write_store
from data_tools.export.to_anndata import to_anndata
from data_tools.export.to_webdataset import to_webdataset


@pytest.fixture(scope="module")
def made(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "store"
    write_store(folder, contents, profile="small", seed=0, created_by="test")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def read_everything(folder: Path) -> None:
    store = Store(folder)
    read_anndata(store, np.arange(len(store)))
    for split in store.manifest.splits:
        store.cells_of_split(split)
    store.source_of(np.arange(len(store)))


def test_a_forged_store_that_changes_nothing_is_read(copy: Path) -> None:
    put_chunk(copy, "gaps", lambda chunk: chunk)
    put_array(copy, "rows/genes", get_array(copy, "rows/genes"))
    sign(copy)
    read_everything(copy)


def scale(name: str, factor: int) -> Callable[[Path], None]:
    return lambda folder: put_array(folder, name, get_array(folder, name).astype(np.uint32) * np.uint32(factor))


def edit(name: str, *keys: str | int, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def put(tree: dict) -> None:
            for key in keys[:-1]:
                tree = tree[key]
            tree[keys[-1]] = value

        edit_json(folder / name, put)

    return change


def shift_first_cell(folder: Path) -> None:
    first = get_array(folder, "rows/first_cell").copy()
    first[1:-1] += 10**9
    put_array(folder, "rows/first_cell", first)


def fill_gaps(value: int, stop: int | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        def fill(chunk: np.ndarray) -> np.ndarray:
            chunk[:stop] = value
            return chunk

        put_chunk(folder, "gaps", fill)

    return change


def one_more_escape(folder: Path) -> None:
    size = int(get_array(folder, "rows/gap_bytes")[0])

    def fill(chunk: np.ndarray) -> np.ndarray:
        chunk[size - 1] = 255  # the last byte of the first cell
        return chunk

    put_chunk(folder, "gaps", fill)


def lead_out_of_the_shard(folder: Path) -> None:
    path = folder / "counts/c/0/0"
    data = path.read_bytes()
    index = np.frombuffer(data[-16 * 256 - 4 : -4], "<i8").reshape(-1, 2).copy()
    index[1] = 8, 1 << 60
    put_shard(path, data[: -16 * 256 - 4], index)


@pytest.mark.parametrize(
    "harm",
    [
        scale("rows/genes", 40),
        scale("rows/gap_bytes", 1000),
        scale("rows/overflow", 500),
        lambda f: put_array(f, "rows/genes", np.zeros(1500, np.uint8)),
        lambda f: put_array(f, "rows/genes", np.ones((1500, 2), np.uint8)),
        lambda f: put_array(f, "rows/gap_bytes", np.full(1500, -1, np.int32)),
        lambda f: put_array(f, "rows/first_cell", np.arange(7) * -5),
        lambda f: put_array(f, "rows/first_cell", np.linspace(0, 1500, 7)),
        shift_first_cell,
        fill_gaps(0),
        fill_gaps(254),
        fill_gaps(255),
        one_more_escape,
        lambda f: put_chunk(f, "counts", lambda chunk: np.full_like(chunk, 255)),
        lambda f: put_chunk(f, "counts", lambda chunk: chunk[:100]),
        lambda f: put_chunk(f, "counts", lambda chunk: bytes(1 << 24)),
        lead_out_of_the_shard,
        lambda f: put_array(f, "obs/celltype", np.full(1500, 3, np.int32)),
        lambda f: put_array(f, "obs/celltype", np.full(1500, -2, np.int32)),
        lambda f: put_array(f, "obs/celltype", np.zeros(1500, np.float64)),
        lambda f: put_array(f, "obs/celltype", np.zeros(1499, np.int32)),
        lambda f: put_array(f, "rows/split", np.full(1500, 9, np.uint8)),
        lambda f: put_array(f, "origin/source", np.full(1500, 9, np.int32)),
        lambda f: put_array(f, "origin/name", np.full((1500, 3), 255, np.uint8)),
        edit("rows/genes/zarr.json", "shape", value=[10**15]),
        edit("rows/genes/zarr.json", "chunk_grid", "configuration", "chunk_shape", value=[5 * 10**9]),
        edit("rows/genes/zarr.json", "codecs", value=[{"name": "bytes"}]),
        edit("obs/celltype/zarr.json", "fill_value", value=7),
        edit("obs/celltype/zarr.json", "data_type", value="float16"),
        edit("obs/celltype/zarr.json", "shape", value="1500"),
        edit("gaps/zarr.json", "chunk_grid", "configuration", "chunk_shape", value=[256, 1 << 40]),
        edit("gaps/zarr.json", "chunk_grid", "configuration", "chunk_shape", value=[0, 9391]),
        edit("gaps/zarr.json", "chunk_grid", value=[]),
        lambda f: (f / "counts/zarr.json").write_text("[" * 100_000),
        lambda f: (f / "genes.csv").write_text("id,symbol,cells\nA,A,1\n"),
        lambda f: (f / "genes.csv").write_bytes(b"\xff\xfe"),
        lambda f: (f / "genes.csv").write_text('id,symbol,cells\n"A'),
    ],
)
def test_what_does_not_fit_together_is_refused(harm: Callable[[Path], None], copy: Path) -> None:
    harm(copy)
    sign(copy)
    with pytest.raises(UserError, match=str(copy)):
        read_everything(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"n_genes": 5},
        {"n_genes": 1 << 40},
        {"n_cells": 10**15},
        {"n_cells": -1},
        {"n_chunks": 10**15},
        {"n_chunks": 0},
        {"gap_bytes": 1 << 40},
        {"count_bytes": 10},
        {"n_nonzeros": 10**30},
        {"splits": {"train": -5}},
        {"genes_sha256": "0" * 64},
    ],
)
def test_numbers_of_the_manifest_are_bounded(change: dict[str, object], copy: Path) -> None:
    sign(copy, lambda tree: tree.update(change))
    with pytest.raises(UserError, match=str(copy)):
        read_everything(copy)


def test_a_chunk_with_room_for_much_more_than_its_cells_is_refused(copy: Path) -> None:
    room = 1 << 33
    edit("counts/zarr.json", "chunk_grid", "configuration", "chunk_shape", value=[256, room])(copy)
    sign(copy, lambda tree: tree.update(count_bytes=room))
    with pytest.raises(UserError, match="more room than its cells need"):
        Store(copy)


@pytest.mark.parametrize(
    "name", ["rows/../../../escaped", "/tmp/escaped", "rows//x", "./x", "", "a\\..\\b", "rows/\x1b[2J", "rows/.."]
)
def test_no_name_leads_out_of_the_folder(name: str, copy: Path, tmp_path: Path) -> None:
    evil = b"#!/bin/sh\n"
    about = {"bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
    (tmp_path / "escaped").write_bytes(evil)
    sign(copy, lambda tree: tree["files"].update({name: about}))
    cache = tmp_path / "deep/er/cache"
    with serve(tmp_path) as server, pytest.raises(UserError, match=r"is damaged: files"):
        open_store(f"{server.url}/copy", access=Access(cache=cache, retries=0))
    with pytest.raises(UserError, match=r"is damaged: files"):
        Store(copy)
    there = {path.relative_to(tmp_path / "deep").parts[0] for path in (tmp_path / "deep").rglob("*")}
    assert there <= {"er"}


def resign_index(folder: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index.pop("fingerprint")
    change(index)
    text = json.dumps(index, indent=1)
    index["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def test_shards_of_webdataset_stay_in_their_folder_and_size(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    to_webdataset(Store(made), folder, blocks_per_shard=3)
    whole = folder / "shards/00000.tar"
    (tmp_path / "outside.tar").write_bytes(whole.read_bytes())
    plain = (folder / INDEX).read_text()

    def rename(index: dict) -> None:
        index["shards"] = {
            name.replace("shards/00000.tar", "../outside.tar"): file for name, file in index["shards"].items()
        }

    resign_index(folder, rename)
    with pytest.raises(UserError, match="is no name of a file in a store"):
        open_store(folder)

    blocks = np.load(folder / "blocks.npy")
    for column, value in ((0, 7), (0, -1), (1, 1 << 50), (2, 1 << 50), (4, -8), (6, 1 << 40)):
        changed = blocks.copy()
        changed[0, column] = value
        np.save(folder / "blocks.npy", changed)
        (folder / INDEX).write_text(plain)
        data = (folder / "blocks.npy").read_bytes()
        about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        resign_index(folder, lambda index, about=about: index.update(blocks=about))  # type: ignore[misc]
        with pytest.raises(UserError, match=r"blocks\.npy"):
            open_store(folder)


def test_a_column_of_dots_stays_below_obs() -> None:
    assert obs_path("..") == "obs/%2E%2E"
    assert obs_path(".") == "obs/%2E"
    assert obs_path("a.b") == "obs/a.b"


def test_to_anndata_refuses_cells_that_do_not_decode(copy: Path, tmp_path: Path) -> None:
    fill_gaps(254)(copy)
    sign(copy)
    with pytest.raises(UserError, match="does not decode into counts"):
        to_anndata(Store(copy), tmp_path / "x.h5ad")
    assert not (tmp_path / "x.h5ad").exists()


@pytest.mark.parametrize(
    "name", ["genes.csv", "gaps/zarr.json", "rows/split/c/0", "obs/dose/zarr.json", "obs/dose/c/0"]
)
def test_a_flipped_bit_anywhere_is_found_when_it_is_read(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        read_everything(copy)


def test_a_chunk_that_vanishes_after_opening_is_no_zeros(copy: Path) -> None:
    store = Store(copy)
    (copy / "obs/hours/c/0").unlink()
    with pytest.raises(UserError, match="obs/hours/c/0 is missing"):
        store.column("time")


def test_a_chunk_of_zeros_that_was_never_written_is_zeros(contents: Contents, tmp_path: Path) -> None:
    obs = contents.obs.assign(celltype="B", hours=0.0)
    write_store(tmp_path / "s", replace(contents, obs=obs), profile="fast", seed=0, created_by="test")
    assert not (tmp_path / "s/obs/hours/c/0").exists()
    batch = CountReader(Store(tmp_path / "s"), ["time", "cell_type"]).read_cells(np.arange(10))
    assert batch.obs["hours"].tolist() == [0.0] * 10
    assert batch.obs["celltype"].tolist() == [0] * 10
