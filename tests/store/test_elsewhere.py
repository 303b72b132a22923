"""Stores in other forms and places give the same batches as the store on the disk, or an error that names the file."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
from servers import RangeServer, find_moto, put, serve, serve_s3, upload

from bgen.data.loader import CountReader, TrainLoader
from bgen.data.skip_damage import SkippingReader
from bgen.errors import UserError
from bgen.store.cache import DiskCache
from bgen.store.open import open_store
from bgen.store.remote import Access, RemoteFiles, RemoteStore
from bgen.store.store import Store
from bgen.store.webdataset_store import TarStore
from data_tools.building.write import Contents, write_store
from data_tools.export.to_webdataset import to_webdataset


def access(tmp_path: Path, **options: object) -> Access:
    return Access(**{"cache": tmp_path / "cache", "retries": 3, "first_pause": 0.01, "longest_pause": 0.05, **options})  # type: ignore[arg-type]


def batches(store: Store, steps: range, world: int = 1) -> list[list[np.ndarray]]:
    order = store.order("train", batch=96, lanes=4, window=2, seed=5)
    reader = CountReader(store, ["cell_type", "dose"])
    loaders = [TrainLoader(reader, order, seed=5, rank=rank, world=world) for rank in range(world)]
    found = []
    for step in steps:
        parts = [loader.read(step)[0] for loader in loaders]
        found.append(
            [
                np.concatenate([getattr(part, name).numpy() for part in parts])
                for name in ("cells", "keys", "indices", "counts")
            ]
            + [np.concatenate([part.obs[name].numpy() for part in parts]) for name in parts[0].obs]
        )
    return found


def same(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
    pairs = [pair for one, two in zip(a, b, strict=True) for pair in zip(one, two, strict=True)]
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in pairs)


@pytest.fixture(scope="module", params=["small", pytest.param("fast", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """In place of the one of tests/conftest.py: tests/store/test_store.py reads both profiles."""
    folder = tmp_path_factory.mktemp("stores") / request.param
    write_store(folder, contents, profile=request.param, seed=0, created_by="test")
    return Store(folder)


@pytest.fixture(scope="module")
def tar(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tar") / "tars"
    steps: list[tuple[int, int]] = []
    n_shards = to_webdataset(store, folder, blocks_per_shard=2, progress=lambda *step: steps.append(step))
    assert n_shards == len(list((folder / "shards").iterdir())) == len(steps) == -(-store.manifest.n_chunks // 2)
    assert steps[-1] == (1500, 1500)
    return folder


def test_tar_shards_train_like_the_store(store: Store, tar: Path) -> None:
    other = open_store(tar)
    assert isinstance(other, TarStore)
    assert other.fingerprint == store.fingerprint
    assert same(batches(other, range(30)), batches(store, range(30)))
    assert same(batches(other, range(9, 12), world=3), batches(store, range(9, 12)))
    assert other.names().tolist() == store.names().tolist()
    assert other.find_damaged_files() == []


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_the_shards(store: Store, tar: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed (extra bench)")
    urls = [str(path) for path in sorted((tar / "shards").iterdir())]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    gc.collect()  # webdataset does not close the files that it read
    assert len(samples) == store.manifest.n_chunks
    zstd = numcodecs.Zstd()
    seen = 0
    for sample in samples:
        about = sample["json"]
        cells = np.arange(about["first_cell"], about["first_cell"] + about["cells"])
        wanted = CountReader(store).read_cells(cells)
        gaps = np.frombuffer(zstd.decode(sample["gaps.zst"]), np.uint8)
        counts = np.frombuffer(zstd.decode(sample["counts.zst"]), np.uint8)
        # the few lines that somebody without bgen would write
        genes, values = [], []
        at, n = 0, sum(about["genes"])
        spilt = iter(counts[-(-n // 4) * 4 :][: 4 * sum(about["overflow"])].view("<u4"))
        for size in about["gap_bytes"]:
            gene = -1
            for gap in gaps[at : at + size].tolist():
                gene += gap + (gap < 255)
                if gap < 255:
                    genes.append(gene)
            at += size
        for count in counts[:n].tolist():
            values.append(count if count < 255 else int(next(spilt)))
        assert genes == wanted.indices.tolist()
        assert values == wanted.counts.tolist()
        column, codes = store.column("cell_type")
        assert about["obs"]["celltype"] == [column.categories[code] for code in codes[cells]]
        assert about["name"] == store.names()[cells].tolist()
        assert [value is None for value in about["obs"]["dose"]] == np.isnan(store.column("dose")[1][cells]).tolist()
        seen += about["cells"]
    assert seen == 1500


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_to_tar_shards_is_found_and_named(tar: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tar, tmp_path / "copy"))
    flip(copy / "shards/00001.tar", 700)
    damaged = TarStore(copy)
    (problem,) = damaged.find_damaged_files()
    assert problem.startswith("shards/00001.tar does not have the bytes")
    with pytest.raises(UserError, match=r"chunk 2 in .*shards/00001.tar does not have the bytes"):
        batches(damaged, range(30))
    (copy / "shards/00001.tar").write_bytes(b"short")
    with pytest.raises(UserError, match=r"shards/00001.tar has 5 bytes"):
        TarStore(copy)
    (copy / "shards/00001.tar").unlink()
    with pytest.raises(UserError, match=r"shards/00001.tar is missing"):
        TarStore(copy)
    flip(copy / "blocks.npy", 200)
    with pytest.raises(UserError, match=r"blocks.npy does not have the bytes"):
        TarStore(copy)
    flip(copy / "webdataset.json", 60)
    with pytest.raises(UserError, match="was changed"):
        TarStore(copy)


@pytest.fixture
def server(store: Store, tar: Path, tmp_path: Path) -> Iterator[RangeServer]:
    shutil.copytree(store.folder, tmp_path / "www/atlas")
    shutil.copytree(tar, tmp_path / "www/deep/tars")
    with serve(tmp_path / "www") as server:
        yield server


@pytest.mark.parametrize("place", ["atlas", "deep/tars"])
def test_http_trains_like_the_store(place: str, store: Store, server: RangeServer, tmp_path: Path) -> None:
    other = open_store(f"{server.url}/{place}", access=access(tmp_path))
    assert isinstance(other, RemoteStore if place == "atlas" else TarStore)
    assert same(batches(other, range(26)), batches(store, range(26)))
    # the whole streams were never asked for
    assert not any("/c/0/0 " in asked or ".tar " in asked for asked in server.seen if asked.endswith(" "))
    # everything is in the cache: opening and reading again asks for little, and for no chunk
    server.seen.clear()
    again = open_store(f"{server.url}/{place}", access=access(tmp_path))
    assert same(batches(again, range(26), world=2), batches(store, range(26)))
    names = {asked.split()[0].rsplit("/", 1)[-1] for asked in server.seen}
    assert names <= {"manifest.json", "webdataset.json", "blocks.npy"}


def test_a_shaky_server_is_asked_again(store: Store, tmp_path: Path) -> None:
    with serve(store.folder, failures=2) as server:
        other = open_store(server.url, access=access(tmp_path))
        assert same(batches(other, range(5)), batches(store, range(5)))
        assert min(server.seen.values()) >= 3


def test_as_many_requests_are_made_at_once_as_there_are_threads(store: Store, tmp_path: Path) -> None:
    n = store.manifest.n_chunks
    assert n > 4
    with serve(store.folder) as server:
        remote = RemoteStore(server.url, access(tmp_path, threads=n))
        server.together = n
        for future in remote.read_chunks(np.arange(n), remote.arena(n), np.arange(n)):
            future.result()
        assert server.most == n
        assert [remote.windows_ahead(16), store.windows_ahead(16)] == [2, 2]
        assert RemoteStore(server.url, access(tmp_path / "b", threads=64)).windows_ahead(16) == 6


def test_a_store_is_opened_with_as_many_requests_at_once(store: Store, tmp_path: Path) -> None:
    with serve(store.folder) as server:
        server.together = 5  # of chunks of genes, gap_bytes, overflow, split and first_cell
        RemoteStore(server.url, access(tmp_path, threads=16))
        assert server.most == 5


def test_all_files_of_an_array_are_asked_for_at_once(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bgen.store.format.columns.ROWS_CHUNK", "bgen.store.store.ROWS_CHUNK", "bgen.order.groups.PART"):
        monkeypatch.setattr(name, 256)
    write_store(tmp_path / "store", contents, profile="small", seed=0, created_by="test")
    local = Store(tmp_path / "store", access=access(tmp_path / "a"))
    with serve(tmp_path / "store") as server:
        remote = RemoteStore(server.url, access(tmp_path / "b", threads=16))
        server.together = 5  # the first of six tells the type
        assert np.array_equal(remote.column("cell_type")[1], local.column("cell_type")[1])
        assert server.most == 5
        server.together = 0
        assert np.array_equal(remote.names(cells=np.arange(0, 1500, 7)), local.names(cells=np.arange(0, 1500, 7)))


def test_readers_that_start_together_fetch_once(store: Store, tmp_path: Path) -> None:
    with serve(store.folder) as server, ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: RemoteStore(server.url, access(tmp_path)), range(4)))
        asked = {name: n for name, n in server.seen.items() if not name.startswith("/manifest.json")}
    assert {len(one) for one in stores} == {1500}
    assert set(asked.values()) == {1}
    assert any(name.startswith("/rows/genes/c/0") for name in asked)


def test_what_cannot_be_reached_is_named(store: Store, server: RangeServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no store at .*/nothing"):
        open_store(f"{server.url}/nothing", access=access(tmp_path))
    other = open_store(f"{server.url}/atlas", access=access(tmp_path))
    for name in ("celltype", "dose"):
        other.column(name)
    other.cells_of_split("train")
    server.failures = 10**9
    with pytest.raises(UserError, match=r"/atlas/(gaps|counts)/c/0/0 cannot be read, after 3 retries"):
        batches(other, range(5))
    server.failures = 0
    assert same(batches(other, range(5)), batches(store, range(5)))
    with pytest.raises(UserError, match="cannot be read, after 3 retries"):
        open_store("http://127.0.0.1:1/atlas", access=access(tmp_path))  # nobody is there
    with pytest.raises(UserError, match="cannot be read, after 3 retries"):
        RemoteStore("http://127.0.0.1:1/atlas", access=access(tmp_path))


@pytest.mark.parametrize(("place", "name"), [("atlas", "manifest.json"), ("deep/tars", "webdataset.json")])
def test_a_manifest_without_an_end_is_not_read(
    place: str, name: str, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("remote", "webdataset_store", "format.manifest"):
        monkeypatch.setattr(f"bgen.store.{module}.MOST_BYTES", 100_000)
    with (tmp_path / "www" / place / name).open("a") as file:
        file.write(" " * 200_000)
    server.seen.clear()
    with pytest.raises(UserError, match=f"{name}.* has more than 100,000 bytes"):
        open_store(f"{server.url}/{place}", access=access(tmp_path))
    assert not any(asked.split()[0].endswith(name) and asked.endswith(" ") for asked in server.seen)  # in parts only
    with pytest.raises(UserError, match=f"{name}.*has more than 0 MiB"):
        open_store(tmp_path / "www" / place)


def test_remote_damage_is_found_and_named(server: RangeServer, tmp_path: Path) -> None:
    www = tmp_path / "www/atlas"
    flip(www / "gaps/c/0/0", 1000)
    with pytest.raises(UserError, match=r"chunk \d in http.*/gaps/c/0/0 does not have the bytes"):
        batches(open_store(f"{server.url}/atlas", access=access(tmp_path)), range(30))
    (www / "counts/c/0/0").unlink()
    with pytest.raises(UserError, match=r"counts/c/0/0 is missing|gaps/c/0/0 does not have"):
        batches(open_store(f"{server.url}/atlas", access=access(tmp_path / "b")), range(30))
    flip(www / "rows/genes/c/0", 20)
    with pytest.raises(UserError, match=r"rows/genes/c/0 does not have the bytes"):
        open_store(f"{server.url}/atlas", access=access(tmp_path / "c"))


def test_a_shard_of_another_store_is_noticed(store: Store, server: RangeServer, tmp_path: Path) -> None:
    shard = tmp_path / "www/atlas/gaps/c/0/0"
    shard.write_bytes(shard.read_bytes()[4:])
    with pytest.raises(UserError, match="gaps/c/0/0"):
        batches(open_store(f"{server.url}/atlas", access=access(tmp_path)), range(3))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    program = find_moto()
    if program is None:
        pytest.skip("needs moto[s3,server]")
    with serve_s3(program) as url:
        yield url


@pytest.mark.parametrize("form", ["zarr", "tar"])
def test_s3_trains_like_the_store(
    form: str, store: Store, tar: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    where = f"{store.manifest.profile}-{form}"
    upload(store.folder if form == "zarr" else tar, f"{s3}/atlas/{where}")
    other = open_store(f"s3://atlas/{where}", access=access(tmp_path, endpoint=s3))
    assert same(batches(other, range(26)), batches(store, range(26)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    again = open_store(f"s3://atlas/{where}/", access=access(tmp_path / "b"))
    assert same(batches(again, range(2)), batches(store, range(2)))
    if form == "zarr":
        data = bytearray((store.folder / "counts/c/0/0").read_bytes())
        data[100] ^= 1
        put(f"{s3}/atlas/{where}/counts/c/0/0", bytes(data))
        with pytest.raises(UserError, match=r"s3://atlas/.*/counts/c/0/0 does not have the bytes"):
            batches(open_store(f"s3://atlas/{where}", access=access(tmp_path / "c", endpoint=s3)), range(26))
    with pytest.raises(UserError, match="no store at s3://atlas/nothing"):
        open_store("s3://atlas/nothing", access=access(tmp_path, endpoint=s3))


def test_the_cache_keeps_to_its_limit_and_forgets_what_is_damaged(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 10_000)
    for i in range(50):
        cache.put(f"chunk{i}", bytes([i]) * 996)
        assert cache.get("chunk0") == bytes(996)  # is asked for all the time, and stays
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 10_000
    assert cache.get("chunk49") == bytes([49]) * 996
    assert cache.get("chunk20") is None
    flip(tmp_path / "cache/chunk49", 5)
    assert cache.get("chunk49") is None
    assert DiskCache(tmp_path / "cache", 10_000).get("chunk0") == bytes(996)


def test_the_limit_of_the_cache_holds_for_all_processes_of_a_machine(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path / "cache", 10_000) for _ in range(8)]  # as eight ranks open it
    for i in range(200):
        caches[i % 8].put(f"chunk{i}", bytes(996))
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 10_000
    assert caches[0].get("chunk199") == bytes(996)


def test_s3_without_credentials_says_what_to_do(tmp_path: Path) -> None:
    refused = "PERMISSION_DENIED: Unknown"
    assert "data.access.anonymous=true" in RemoteFiles("s3://bucket/store", access(tmp_path))._credentials_missing(
        refused
    )
    assert not RemoteFiles("s3://bucket/store", access(tmp_path, anonymous=True))._credentials_missing(refused)
    assert not RemoteFiles("http://127.0.0.1/s", access(tmp_path))._credentials_missing(refused)


@pytest.mark.parametrize("store", ["small"], indirect=True)
@pytest.mark.parametrize("place", ["atlas", "deep/tars"])
def test_verbs_take_addresses(
    place: str, store: Store, server: RangeServer, bgen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"{server.url}/{place}"
    told = bgen("data", "info", url, "--json")
    assert json.loads(told.out)["fingerprint"] == store.fingerprint
    assert url in bgen("data", "info", url).out
    assert "every file is as it was written" in bgen("data", "verify", url).out
    assert bgen("data", "to-anndata", url, "--out", tmp_path / "out.h5ad").code == 0
    refused = bgen("data", "to-webdataset", url, "--out", tmp_path / "tars")
    assert (refused.code, "copy the store to this machine" in " ".join(refused.err.split())) == (2, True)
    flip(tmp_path / "www" / place / ("gaps/c/0/0" if place == "atlas" else "shards/00000.tar"), 300)
    damaged = bgen("data", "verify", url)
    assert damaged.code == 2
    assert "does not have the bytes" in " ".join(damaged.err.split())


def test_training_goes_on_with_a_full_or_tiny_cache(store: Store, server: RangeServer, tmp_path: Path) -> None:
    other = open_store(f"{server.url}/atlas", access=access(tmp_path, cache_bytes=1000))
    assert same(batches(other, range(26)), batches(store, range(26)))


def test_damaged_chunks_can_be_skipped_and_are_counted(store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.folder, tmp_path / "copy"))
    flip(copy / "gaps/c/0/0", 1000)
    damaged = Store(copy)
    order = damaged.order("train", batch=96, lanes=4, window=2, seed=5)
    reader = SkippingReader(damaged, ["cell_type"])
    replaced = 0
    loaders = [TrainLoader(reader, order, seed=5, rank=rank, world=2) for rank in range(2)]
    for step in range(26):
        cells = order.cells(step)
        found = [loader.read(step)[0] for loader in loaders]
        got = np.concatenate([batch.cells.numpy() for batch in found])
        kept = got == cells
        replaced += int((~kept).sum())
        truth = CountReader(store).read_cells(got)
        assert np.array_equal(np.concatenate([batch.counts.numpy() for batch in found]), truth.counts.numpy())
        types = np.concatenate([batch.obs["celltype"].numpy() for batch in found])
        assert np.array_equal(types, store.column("celltype")[1][got])
        assert np.isin(got, store.cells_of_split("train")).all()
    bad = list(reader.skipped)
    assert len(bad) == 1
    assert "gaps/c/0/0 does not have the bytes" in reader.skipped[bad[0]]
    wanted = np.concatenate([order.cells(step) for step in range(26)])
    in_bad = np.searchsorted(store.first_cell, wanted, side="right") - 1 == bad[0]
    assert replaced == reader.skipped_cells == int(in_bad.sum()) > 0
    # what cannot be reached is not skipped
    shutil.rmtree(copy / "counts/c")
    with pytest.raises(UserError, match="counts/c/0/0"):
        TrainLoader(SkippingReader(damaged), order, seed=5).read(0)


@pytest.mark.parametrize("store", ["small"], indirect=True)
def test_a_connection_that_stalls_is_given_up(store: Store, tmp_path: Path) -> None:
    """The server takes the connection and never answers: the request is made again. The limit is read on loading."""
    script = """
        import sys
        from pathlib import Path
        from bgen.config.data import Access
        from bgen.store.open import open_store
        opened = open_store(sys.argv[1], access=Access(cache=Path(sys.argv[2]), retries=2, first_pause=0.01))
        print(len(opened))
    """
    environment = {**os.environ, "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    with serve(store.folder) as server:
        server.silent |= {"/rows/genes/c/0", "/genes.csv"}
        command = [sys.executable, "-c", textwrap.dedent(script), server.url, str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    assert int(done.stdout) == len(store)
    assert not server.silent


def test_stalled_connections_are_noticed_within_a_minute_unless_the_user_says_otherwise() -> None:
    assert int(os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"]) <= 60
    assert int(os.environ["TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES"]) >= 1
