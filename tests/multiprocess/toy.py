"""A small stage on synthetic cells, and a script that trains it: what the multi-process tests launch.

The cells of a step are a pure function of (step, slot), so every number of ranks sees the same global batches.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgen.config.load import validate
from bgen.config.schema import Config
from bgen.data.batch import CellBatch
from bgen.train.engine import batch_plan
from bgen.train.trainer import Trainer, TrainResult, check

GENES = 20


@functools.cache
def cells(step: int, first: int, count: int) -> CellBatch:
    """Cells ``first`` to ``first + count`` of the global batch of ``step``."""
    rows = []
    for slot in range(first, first + count):
        generator = torch.Generator().manual_seed(1_000_003 * step + slot)
        rows.append(torch.randint(0, 4, (GENES,), generator=generator))
    dense = torch.stack(rows)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), (dense > 0).sum(1).cumsum(0)])
    numbers = torch.arange(first, first + count) + 1000 * step
    return CellBatch(
        indptr,
        dense.nonzero()[:, 1].int(),
        dense[dense > 0].float(),
        GENES,
        keys=numbers.clone(),
        cells=numbers,
        step=step,
    )


class ToyModel(nn.Module):
    """Predicts a fixed function of the counts."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(GENES, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.A_log = nn.Parameter(torch.zeros(8))
        self.register_buffer("scale", torch.ones(1))
        self.poison: Callable[[CellBatch], Tensor | None] = lambda batch: None

    def forward(self, batch: CellBatch) -> dict[str, Tensor]:
        values = self.embedding(batch.indices) * batch.counts[:, None]
        pooled = torch.zeros(len(batch), 8).index_add_(0, batch.rows, values.float()) * self.A_log.exp() / 10
        target = (batch.library - 30.0) / 5.0
        squared = (self.body(pooled)[:, 0].float() - target) ** 2
        poison = self.poison(batch)
        if poison is not None:
            squared = squared + poison
        return {"loss": squared + 0.01, "nll": squared}


class ToyStage:
    """The stage of the trainer's protocol."""

    def __init__(self, config: Config, dropout: float = 0.0) -> None:
        self.world = check(config)
        torch.manual_seed(config.seed)
        self.config = config
        self.module: nn.Module = ToyModel(dropout)
        self.monitor = "nll"
        self.fingerprint: dict[str, Any] = {"store": "toy"}
        self.finished: list[nn.Module] = []

    def train_batches(self, start_step: int) -> Iterator[Sequence[CellBatch]]:
        plan = batch_plan(self.config.train, self.world.size)
        first = self.world.rank * plan.micro * plan.accumulation
        step = start_step
        while True:
            yield [cells(step, first + part * plan.micro, plan.micro) for part in range(plan.accumulation)]
            step += 1

    def valid_batches(self) -> Iterator[tuple[CellBatch, Tensor]]:
        # 30 cells in batches of 8: the last two of the last are padding.
        share = 32 // self.world.size
        for begin in range(self.world.rank * share, (self.world.rank + 1) * share, 8):
            slots = torch.arange(begin, begin + 8)
            yield cells(10_000, begin, 8), (slots < 30).float()

    def finish(self, module: nn.Module) -> None:
        self.finished.append(module)


def toy_config(out: Path, train: dict[str, Any] | None = None, track: dict[str, Any] | None = None) -> Config:
    """A configuration of a few quick steps."""
    settings = {"steps": 50, "global_batch": 8, "warmup": 5, "log_every": 1, "eval_every": 10, "checkpoint_every": 25}
    settings |= {"learning_rate": 0.01, "zero": 0, "start_timeout": 60, "step_timeout": 60, "schedule": "constant"} | (
        train or {}
    )
    tree = {"stage": "vae", "out": out, "data": {"store": "toy"}, "train": settings}
    tree["track"] = {"mlflow": False, "progress": False} | (track or {})
    return validate(tree, "toy")


def run(
    config: Config, resume: bool = False, stop_after: int = 0, dropout: float = 0.0
) -> tuple[TrainResult, ToyStage]:
    """Train; with ``stop_after``, send this process SIGTERM when that many steps' batches have been drawn."""
    stage = ToyStage(config, dropout)
    if stop_after:
        drawn = stage.train_batches

        def signalling(start_step: int) -> Iterator[Sequence[CellBatch]]:
            for step, batches in enumerate(drawn(start_step), start_step):
                if step == stop_after - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batches

        stage.train_batches = signalling  # type: ignore[method-assign]
    return Trainer(config, stage).fit(resume), stage
