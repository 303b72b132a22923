"""TensorBoard and Weights & Biases as mirrors of a run's record, beside MLflow and like it (:mod:`bgen.track.mirror`).

The record is the truth: both are made from it, and a run that was killed and went on reads as one uninterrupted run.
Each needs its extra, ``tensorboard`` or ``wandb``. Weights & Biases reads its own variables: ``WANDB_MODE=offline``
keeps everything in the run folder, from which ``wandb sync`` sends it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bgen.track.record import Tail, metrics_of
from bgen.track.target import Target


class TensorBoardRun:
    """Writes event files into the folder ``target.uri``: those of an earlier attempt are written anew."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._writer: Any = None
        self._tail = Tail(Path(target.record))

    def connect(self) -> None:
        """Open the event file, unless that is done."""
        if self._writer is not None:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        for old in Path(self.target.uri).glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(self.target.uri)
        table = "\n".join(f"| {name} | {value} |" for name, value in self.target.params.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", 0)

    def send(self) -> None:
        """Write the rows that are new."""
        for row in self._tail.rows():
            for key, value, moment, step in metrics_of(row):
                self._writer.add_scalar(key, value, step, moment / 1000)
        self._writer.flush()
        self._tail.keep()

    def finish(self, status: str) -> None:
        """Write how the run ended."""
        self._writer.add_text("status", status, 0)
        self._writer.close()


class WandbRun:
    """Sends rows to a run of Weights & Biases, which has the identifier of the training run across restarts."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._run: Any = None
        self._tail = Tail(Path(target.record))

    def connect(self) -> None:
        """Find the run or create it, unless that is done."""
        if self._run is not None:
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run = wandb.init(
            project=self.target.experiment,
            name=self.target.run_name,
            id=self.target.run,
            resume="allow",
            dir=str(Path(self.target.record).parent),
            config=self.target.params,
            settings=wandb.Settings(console="off"),
        )

    def send(self) -> None:
        """Send the rows that are new; W&B takes a step once, so those that it has are left out."""
        for row in self._tail.rows():
            values = {key: value for key, value, _, _ in metrics_of(row)}
            if values and row["step"] >= self._run.step:
                self._run.log(values, step=row["step"])
        self._tail.keep()

    def finish(self, status: str) -> None:
        """End the run."""
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
