"""What is held of every cell: one file for all processes of a machine, whole or made again; few bytes in each."""

from __future__ import annotations

import multiprocessing
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.config.data import Access, TrajectoriesConfig
from bgen.data.loader import CountReader, TrainLoader
from bgen.data.trajectory_loader import read_trajectories
from bgen.errors import Unreachable
from bgen.order import groups, weighted
from bgen.store import host
from bgen.store.format.columns import ROWS_CHUNK
from bgen.store.format.manifest import Source
from bgen.store.host import HALF, LOCK, UNUSED_DAYS, HostArrays
from bgen.store.leakage import assert_no_leakage
from bgen.store.open import open_store
from bgen.store.store import Store
from bgen.store.weighting import weighted_order
from data_tools.building.splits import DEFAULT, assign
from data_tools.building.write import Contents, write_store

N = 1000


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != LOCK)


def count_to(values: NDArray[Any]) -> None:
    values[:] = np.arange(len(values))


def refuse(values: NDArray[Any]) -> None:
    raise AssertionError("made a second time")


def test_made_once_and_mapped(tmp_path: Path) -> None:
    first = HostArrays(tmp_path).get("x", N, np.uint16, count_to)
    second = HostArrays(tmp_path).get("x", N, np.uint16, refuse)
    assert np.array_equal(first, np.arange(N))
    assert np.array_equal(second, first)
    assert not second.flags.writeable
    assert isinstance(second.base, np.memmap)
    (file,) = files(tmp_path)
    assert file.stat().st_size == 2 * N + 4
    assert file.stat().st_mode & 0o077 == 0
    HostArrays(tmp_path).get("y", N, np.uint16, count_to)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_file_is_made_again(harm: str, tmp_path: Path) -> None:
    HostArrays(tmp_path).get("x", N, np.int64, count_to)
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    data[4000] ^= 1
    file.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[harm])
    assert np.array_equal(HostArrays(tmp_path).get("x", N, np.int64, count_to), np.arange(N))
    assert len(files(tmp_path)) == 1


def test_an_error_of_the_store_is_told_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(values: NDArray[Any]) -> None:
        raise Unreachable("the server is away")

    with pytest.raises(Unreachable, match="the server is away"):
        HostArrays(tmp_path).get("x", N, np.int64, fail)
    assert files(tmp_path) == []
    assert capsys.readouterr().err == ""


def test_without_room_a_process_has_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    arrays = HostArrays(tmp_path)
    assert np.array_equal(arrays.get("x", N, np.int64, count_to), np.arange(N))
    arrays.get("y", N, np.int64, count_to)
    assert files(tmp_path) == []
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1
    assert "data.access.cache" in said


def test_a_user_without_a_home(capsys: pytest.CaptureFixture[str]) -> None:
    assert np.array_equal(HostArrays(None).get("x", N, np.int64, count_to), np.arange(N))
    assert "no home folder" in capsys.readouterr().err


def test_files_that_nobody_uses_are_removed(tmp_path: Path) -> None:
    for key in ("old", "new"):
        HostArrays(tmp_path).get(key, N, np.int64, count_to)
    mapped = HostArrays(tmp_path).get("old", N, np.int64, refuse)
    (tmp_path / f"{HALF}killed").write_bytes(b"x")
    old = min(files(tmp_path), key=lambda path: (path.name.startswith(HALF), path.stat().st_mtime))
    os.utime(old, (0, old.stat().st_mtime - 86_401 * UNUSED_DAYS))
    HostArrays(tmp_path).get("third", N, np.int64, count_to)
    assert len(files(tmp_path)) == 2
    assert np.array_equal(mapped, np.arange(N))


def _make_slowly(folder: Path, made: Path, together: Barrier) -> None:
    def fill(values: NDArray[Any]) -> None:
        (made / str(os.getpid())).touch()
        time.sleep(0.3)  # the others have come by then, and wait
        count_to(values)

    together.wait()
    assert np.array_equal(HostArrays(folder).get("x", 100_000, np.int64, fill), np.arange(100_000))


def test_processes_that_start_together_make_one(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    context = multiprocessing.get_context("fork")
    together = context.Barrier(4)
    processes = [context.Process(target=_make_slowly, args=(tmp_path / "arrays", made, together)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(made.iterdir())) == 1


def write(folder: Path, n: int) -> Path:
    """Write a store of cells that express one gene or two; they are what a billion cells are in all but counts."""
    rng = np.random.default_rng(0)
    each = 1 + (np.arange(n) % 3 == 0)
    indptr = np.append(0, np.cumsum(each))
    counts = sp.csr_matrix((np.ones(indptr[-1]), np.arange(indptr[-1]) % 7, indptr), (n, 7))
    counts.sum_duplicates()
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical.from_codes(rng.integers(0, 4, n), [f"D{i}" for i in range(4)]),
            "drug": pd.Categorical.from_codes(rng.integers(0, 300, n), [f"drug {i}" for i in range(300)]),
            "hours": rng.choice([0.0, 6.0, 12.0], n),
        },
        index=pd.RangeIndex(n).astype(str),
    )
    contents = Contents(
        counts=counts,
        genes=pd.DataFrame({"id": [f"G{i}" for i in range(7)], "symbol": [f"S{i}" for i in range(7)]}),
        obs=obs,
        split=assign(DEFAULT, None, n, 0),
        splits=list(DEFAULT),
        source=np.zeros(n, np.int32),
        row=np.arange(n),
        sources=[Source(name="x.h5ad", bytes=1, cells=n, kept=n, matrix="X")],
        organism="synthetic",
        roles={"donor": "donor", "perturbation": "drug", "time": "hours"},
        control="drug 0",
    )
    write_store(folder, contents, profile="small", seed=0, created_by="test")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Return stores of 100,000 and of 200,000 cells."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "PART", ROWS_CHUNK // 4)  # of such parts, and of such marks, there are many
        patch.setattr(weighted, "MARKS", 0)
        patch.setattr(host, "PIECE", 4096)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield [write(folder / str(n), n) for n in (100_000, 200_000)]


def grown(two: list[Path], work: Callable[[Path], object]) -> float:
    """Return by how many bytes a cell the most memory that some work takes grows."""
    peaks = []
    for path in two:
        work(path)  # once before: it compiles, and makes the files
        tracemalloc.start()
        kept = work(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del kept
    return (peaks[1] - peaks[0]) / 100_000


def train(path: Path) -> object:
    store = open_store(path)
    reader = CountReader(store, ["donor", "perturbation", "time"])
    loader = TrainLoader(reader, store.order("train", batch=256, lanes=2, window=4, seed=0), seed=0)
    return loader, loader.read(0), loader.read(1)


def weigh(path: Path) -> object:
    store = open_store(path)
    options: dict[str, Any] = {"batch": 256, "lanes": 2, "window": 4, "seed": 0, "temperature": 3.0}
    orders = [weighted_order(store, "train", by=by, **options) for by in (None, "perturbation")]
    return store, orders, [order.cells(0) for order in orders]


def follow(path: Path) -> object:
    store = open_store(path)
    shapes = [TrajectoriesConfig(along=along, system=["donor"], cells=8) for along in ("time", "perturbation")]
    return store, [read_trajectories(store, "train", shape) for shape in shapes]


def look_for_leaks(path: Path) -> object:
    store = open_store(path)
    assert_no_leakage(store)
    return store


@pytest.mark.parametrize("work", [train, weigh, follow, look_for_leaks])
def test_few_bytes_a_cell(work: Callable[[Path], object], two: list[Path]) -> None:
    """A rank's own memory; what it shares with the others is mapped, and tracemalloc does not count it."""
    assert grown(two, work) < 2


def test_small_types_and_the_same_values(two: list[Path]) -> None:
    store = Store(two[1])
    n = len(store)
    kinds = {"donor": "i1", "drug": "i2", "hours": "f4"}
    for name, kind in kinds.items():
        _, whole = store.column(name)
        assert whole.dtype == np.dtype(kind)
        parts = [store.column(name, (a, min(a + 70_000, n)))[1] for a in range(0, n, 70_000)]
        assert np.array_equal(whole, np.concatenate(parts))
        some = np.array([n - 1, 0, 65_536, 65_535, 123_456])
        assert np.array_equal(store.column(name, cells=some)[1], whole[some])
    assert [isinstance(store.split(name), range) for name in store.manifest.splits] == [True] * 3
    codes = store.rows("split")
    for code, name in enumerate(store.manifest.splits):
        assert np.array_equal(store.cells_of_split(name), np.flatnonzero(codes == code))
    sources, rows = store.source_of(np.arange(n))
    assert np.array_equal(store.sources(), sources)
    assert sorted(rows) == list(range(n))
    assert np.array_equal(store.origin(5, 99_999)[1], rows[5:99_999])
    assert store.names(cells=np.array([7])).tolist() == [str(rows[7])]


def test_nothing_is_kept_of_small_stores(tmp_path: Path, two: list[Path]) -> None:
    access = Access(cache=tmp_path / "cache")
    small = Store(write(tmp_path / "small", 500), access=access)
    CountReader(small, ["donor"])
    assert not (tmp_path / "cache").exists()
    CountReader(Store(two[0], access=access), ["donor"])
    assert len(files(tmp_path / "cache" / "arrays")) == 4  # three sizes, the column
