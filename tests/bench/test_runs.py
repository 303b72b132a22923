"""A training that a signal stops ends the benchmark: nothing half-trained is measured."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bgen.bench.quality.time_counts import read_simulated, score_missing_time
from bgen.bench.quality.time_latents import recipe
from bgen.data.batch import CellBatch
from bgen.errors import UserError
from bgen.train.stages.from_store import StoreStage


def test_a_signal_ends_the_benchmark(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = StoreStage.train_batches

    def batches(self: StoreStage, start_step: int) -> Iterator[Sequence[CellBatch]]:
        for step, found in enumerate(drawn(self, start_step), start_step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    monkeypatch.setattr(StoreStage, "train_batches", batches)
    cells, system = read_simulated(demo.cells)
    with pytest.raises(UserError, match="Stopped by a signal at step 4; nothing was measured"):
        score_missing_time(cells, 24.0, tmp_path / "out", recipe(steps=20, scale=24.0), system=system, seed=0)
