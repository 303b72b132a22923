"""Whatever looks at a sample of a large store reads few of its chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from bgen.config.flow import FlowConfig
from bgen.data.as_anndata import read_split
from bgen.data.loader import CountReader, valid_batches
from bgen.distributed import world as ranks
from bgen.models.log_counts import LogCounts
from bgen.order.sample import SCATTERED
from bgen.store.format.manifest import Source
from bgen.store.store import Store
from bgen.train.stages import whitening
from data_tools.building.write import Contents, write_store

N, CELLS = 20_000, 500


@pytest.fixture(scope="module", params=[False, True], ids=["shuffled", "by population"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    rng = np.random.default_rng(0)
    population = np.sort(rng.integers(0, 200, N)).astype(str)
    contents = Contents(
        counts=sp.random(N, 40, 0.2, "csr", np.float32, rng, lambda n: rng.integers(1, 9, n)).astype(np.uint32),
        genes=pd.DataFrame({"id": [f"G{i}" for i in range(40)], "symbol": [f"S{i}" for i in range(40)]}),
        obs=pd.DataFrame({"pop": population}, index=[f"cell{i}" for i in range(N)]),
        split=np.zeros(N, np.uint8),
        splits=["train"],
        source=np.zeros(N, np.int32),
        row=np.arange(N),
        sources=[Source(name="x", bytes=1, cells=N, kept=N, matrix="X")],
        organism="none",
        roles={"population": "pop"} if request.param else {},
    )
    folder: Path = tmp_path_factory.mktemp("large") / "store"
    write_store(folder, contents, profile="small", seed=0, created_by="test")
    return Store(folder)


def fit(store: Store) -> None:
    codec = LogCounts(FlowConfig(space="log_counts").log_counts, 40)
    whitening.fit_whitening(codec, CountReader(store), "train", ranks.start(30))


@pytest.mark.parametrize(
    "look",
    [
        lambda store: valid_batches(CountReader(store), "train", seed=0, cells=CELLS, micro_batch=100),
        lambda store: read_split(store, "train", CELLS),
        fit,
    ],
    ids=["held-out cells", "evaluation", "whitening"],
)
def test_a_sample_of_a_large_store_is_of_few_chunks(
    look: Callable[[Store], object], large: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whitening, "WHITENING_CELLS", CELLS)
    read = large.read_chunks
    chunks: set[int] = set()
    monkeypatch.setattr(large, "read_chunks", lambda some, *rest: chunks.update(some.tolist()) or read(some, *rest))
    assert N > SCATTERED * CELLS
    look(large)
    assert large.manifest.n_chunks > 70
    # whole chunks of shuffled cells; a quarter of each chunk where neighbours are of one population
    assert CELLS // 256 <= len(chunks) <= (12 if "population" in large.manifest.roles else 4)


def test_samples_of_populations_are_of_many_of_them(large: Store) -> None:
    drawn = read_split(large, "train", CELLS)
    assert drawn.n_obs == CELLS
    kinds = drawn.obs["pop"].nunique()
    assert kinds > 15
    assert drawn.obs_names.is_unique
