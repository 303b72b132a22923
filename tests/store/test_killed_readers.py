"""Ranks that read 40,000 cells are killed at any moment; as many others go on, and every step has the same cells."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from prefork import python

from bgen.data.loader import CountReader, TrainLoader
from bgen.store.format.manifest import Source
from bgen.store.store import Store
from data_tools.building.splits import DEFAULT, assign
from data_tools.building.write import Contents, write_store

N, BATCH, STEPS = 40_000, 384, 80
READ = """
import signal, sys
from test_killed_readers import make_loader
folder, rank, world, first, last, out = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
steps = make_loader(folder, rank, world).packed_steps(first)
with open(out, "wb", buffering=0) as file:
    for step, (batch,) in zip(range(first, last), steps):
        if first == 0 and step == last - 1:
            signal.pause()  # to be killed: a rank that is ahead waits for the others
        assert batch.step == step
        file.write(batch.cells.numpy().tobytes())
"""


def make_loader(folder: str | Path, rank: int, world: int) -> TrainLoader:
    store = Store(folder)
    return TrainLoader(
        CountReader(store),
        store.order("train", batch=BATCH, lanes=8, window=16, seed=3),
        seed=3,
        rank=rank,
        world=world,
    )


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(
        (np.ones(4 * N, np.uint32), rng.integers(0, 200, 4 * N).astype(np.int32), np.arange(0, 4 * N + 1, 4)), (N, 200)
    )
    counts.sum_duplicates()
    contents = Contents(
        counts=counts,
        genes=pd.DataFrame({"id": [f"G{i}" for i in range(200)], "symbol": [f"S{i}" for i in range(200)]}),
        obs=pd.DataFrame({"cell_type": pd.Categorical(rng.choice(["A", "B"], N))}, index=np.arange(N).astype(str)),
        split=assign(DEFAULT, None, N, 0),
        splits=list(DEFAULT),
        source=np.zeros(N, np.int32),
        row=np.arange(N),
        sources=[Source(name="x.h5ad", bytes=1, cells=N, kept=N, matrix="X")],
        organism="synthetic",
        roles={"cell_type": "cell_type"},
    )
    folder = tmp_path_factory.mktemp("atlas") / "store"
    write_store(folder, contents, profile="small", seed=0, created_by="test")
    return folder


def start(atlas: Path, world: int, first: int, out: Path) -> list[subprocess.Popen[bytes]]:
    return [
        subprocess.Popen(
            [python(), "-c", READ, *map(str, (atlas, rank, world, first, STEPS, out / f"{first}-{rank}"))],
            cwd=Path(__file__).parent,
            env={"PYTHONPATH": ":".join([str(Path(__file__).parents[2]), str(Path(__file__).parent), *sys.path])},
        )
        for rank in range(world)
    ]


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read(world: int, first: int, out: Path) -> np.ndarray:
    """The whole global batches that all ranks gave, ``[steps, BATCH]``."""
    shares = [np.frombuffer((out / f"{first}-{rank}").read_bytes(), np.uint8) for rank in range(world)]
    width = BATCH // world * 8
    steps = min(len(share) for share in shares) // width
    return np.concatenate([share[: steps * width].view(np.int64).reshape(steps, -1) for share in shares], axis=1)


@pytest.mark.parametrize(("before", "after"), [(2, 3), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_killed_ranks_and_others_after_them_read_the_same_cells(
    before: int, after: int, atlas: Path, tmp_path: Path
) -> None:
    order = make_loader(atlas, 0, 1).order
    ranks = start(atlas, before, 0, tmp_path)
    part = BATCH // before * 8 * int(np.random.default_rng().integers(1, 40))  # bytes of any number of steps
    while min(size(tmp_path / f"0-{rank}") for rank in range(before)) < part:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.001)
    for rank in ranks:
        rank.kill()
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * before
    done = read(before, 0, tmp_path)
    first = len(done)
    assert 0 < first < STEPS
    for rank in start(atlas, after, first, tmp_path):
        assert rank.wait() == 0
    rest = read(after, first, tmp_path)
    expected = np.stack([order.cells(step) for step in range(STEPS)])
    assert np.array_equal(np.concatenate([done, rest]), expected)
    assert len(np.unique(expected)) == expected.size  # within an epoch of 32,000
