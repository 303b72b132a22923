"""A store that goes away while it is read, on a disk or at an address: training waits, and gets the same cells."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from bgen.config.data import Access
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader, TrainLoader, valid_batches
from bgen.data.skip_damage import SkippingReader
from bgen.distributed import world as ranks
from bgen.errors import Unreachable, UserError
from bgen.store.open import open_store
from bgen.store.store import Store
from bgen.train import data_outage
from bgen.train.data_outage import Batches

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))

from servers import serve


class Reading:
    """The part of a stage that gives batches."""

    def __init__(self, reader: CountReader) -> None:
        self.reader = reader
        self.order = reader.store.order("train", batch=96, lanes=2, window=1, seed=5)

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        return TrainLoader(self.reader, self.order, seed=5, prefetch=1).steps(start_step)

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        return iter(valid_batches(self.reader, "valid", seed=5, cells=100, micro_batch=16))


def read_with_outage(
    reader: CountReader, away: Callable[[], object], back: Callable[[], object]
) -> tuple[list[np.ndarray], list[str]]:
    """Read 13 steps; the store goes away before the third, and comes back when training waits for it."""
    said: list[str] = []

    def waiting(problem: str | None) -> None:
        said.append(problem or "again")
        if len(said) == 2:
            back()

    batches = Batches(Reading(reader), 0, 60.0, 1000.0, waiting, lambda: False)  # type: ignore[arg-type]
    found = []
    for step in range(13):
        if step == 2:
            away()
        micro_batches, _ = batches.next(alone=True)
        assert micro_batches is not None
        (batch,) = micro_batches
        found += [batch.cells.numpy(), batch.indices.numpy(), batch.counts.numpy(), batch.keys.numpy()]
    assert batches._batches is not None
    batches._batches.close()  # type: ignore[attr-defined]
    return found, said


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause for less between attempts."""
    monkeypatch.setattr(data_outage, "LOOK", 0.05)


@pytest.mark.parametrize("place", ["disk", "server"])
@pytest.mark.parametrize("kind", [CountReader, SkippingReader])
def test_training_waits_for_a_store_that_is_away(
    place: str, kind: type[CountReader], store: Store, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(store.folder, tmp_path / "store"))
    expected, _ = read_with_outage(CountReader(store), lambda: None, lambda: None)
    if place == "disk":
        shards = copy / "counts"
        reader = kind(open_store(copy))
        found, said = read_with_outage(
            reader, lambda: shards.rename(tmp_path / "away"), lambda: (tmp_path / "away").rename(shards)
        )
    else:
        with serve(tmp_path) as server:
            access = Access(cache=tmp_path / "cache", cache_bytes=1, retries=0)
            reader = kind(open_store(f"{server.url}/store", access=access))
            found, said = read_with_outage(
                reader, lambda: setattr(server, "failures", 10**9), lambda: setattr(server, "failures", 0)
            )
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(said) == 2
    assert "the data cannot be read (The store" in said[0]
    assert not getattr(reader, "skipped", {})


def test_a_store_that_is_away_is_one_message_for_everybody_else(store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.folder, tmp_path / "store"))
    reader = CountReader(open_store(copy))
    shutil.rmtree(copy / "counts")
    with pytest.raises(UserError, match="cannot be reached") as caught:
        reader.read_cells(np.arange(5))
    assert isinstance(caught.value, Unreachable)


def test_held_out_cells_are_waited_for(store: Store, tmp_path: Path) -> None:
    ranks.start(30)
    copy = Path(shutil.copytree(store.folder, tmp_path / "store"))
    expected = list(Reading(CountReader(store)).valid_batches())
    reading = Reading(CountReader(open_store(copy)))
    shards, said = copy / "counts", []

    def waiting(problem: str | None) -> None:
        said.append(problem)
        if len(said) == 2:
            (tmp_path / "away").rename(shards)

    shards.rename(tmp_path / "away")
    found = Batches(reading, 0, 60.0, 1000.0, waiting, lambda: False).valid(lambda: False)  # type: ignore[arg-type]
    assert found is not None
    for (batch, weight), (there, its_weight) in zip(found, expected, strict=True):
        assert np.array_equal(batch.counts, there.counts)
        assert np.array_equal(weight, its_weight)
    assert len(said) == 2
    assert "the data cannot be read" in str(said[0])


@pytest.mark.parametrize("ended_by", ["patience", "signal"])
def test_held_out_cells_are_not_waited_for_any_longer(ended_by: str, store: Store, tmp_path: Path) -> None:
    ranks.start(30)
    copy = Path(shutil.copytree(store.folder, tmp_path / "store"))
    reading = Reading(CountReader(open_store(copy)))
    shutil.rmtree(copy / "counts")
    patience, signal = (0.0, False) if ended_by == "patience" else (60.0, True)
    batches = Batches(reading, 0, patience, 1000.0, lambda problem: None, lambda: signal)  # type: ignore[arg-type]
    assert batches.valid(lambda: signal) is None
    assert (batches.given_up is not None) == (ended_by == "patience")
