"""What a checkpoint every 20 steps costs: processor time of the copy, writing and hashing, against the steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ToyStage, toy_config

from bgen.checkpoint import shards
from bgen.config.vae import VAEConfig
from bgen.data.batch import CellBatch
from bgen.models.vae.vae import VAE
from bgen.train.saving import Saver
from bgen.train.trainer import Trainer

CELLS, GENES = 512, 2000


def cells(step: int) -> CellBatch:
    generator = torch.Generator().manual_seed(step)
    expressed = torch.rand(CELLS, GENES, generator=generator) < 0.1
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), expressed.sum(1).cumsum(0)])
    counts = torch.randint(1, 10, (int(indptr[-1]),), generator=generator).float()
    numbers = torch.arange(CELLS) + CELLS * step
    return CellBatch(indptr, expressed.nonzero()[:, 1].int(), counts, GENES, keys=numbers, cells=numbers, step=step)


class VAEStage(ToyStage):
    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        drawn = [cells(step) for step in range(4)]
        step = start_step
        while True:
            yield [drawn[step % 4]]
            step += 1

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        return iter(())


@pytest.mark.slow
def test_a_save_costs_less_than_a_twentieth_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying: list[float] = []
    writing: list[float] = []
    begin, write = Saver.begin, shards.write

    def timed_begin(*arguments: Any) -> str | None:
        start = time.thread_time()
        found = begin(*arguments)
        copying.append(time.thread_time() - start)
        return found

    def timed_write(*arguments: Any) -> dict[str, Any]:
        start = time.thread_time()
        found = write(*arguments)
        writing.append(time.thread_time() - start)
        return found

    monkeypatch.setattr(Saver, "begin", timed_begin)
    monkeypatch.setattr(shards, "write", timed_write)
    settings = {"steps": 100, "checkpoint_every": 20, "global_batch": CELLS, "eval_every": 0, "zero": 1, "ema": 0.999}
    stage = VAEStage(toy_config(tmp_path / "run", settings))
    stage.module = VAE(VAEConfig(), GENES, {})
    start = time.thread_time()
    Trainer(stage.config, stage).fit()
    per_20_steps = (time.thread_time() - start) / 5
    cost = statistics.median(copying) + statistics.median(writing)
    print(f"copy {statistics.median(copying):.4f} s, write and hash {statistics.median(writing):.4f} s, "
          f"20 steps {per_20_steps:.2f} s: {100 * cost / per_20_steps:.2f} %")  # fmt: skip
    assert cost < 0.05 * per_20_steps
