"""The training loop: the same for every stage, every number of ranks, and before and after a restart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgen.checkpoint import files
from bgen.checkpoint.commit import Checkpoints, SaveError
from bgen.checkpoint.weights import read_weights, write_weights
from bgen.config.errors import UserError, nearest
from bgen.config.schema import Config
from bgen.data.batch import CellBatch
from bgen.distributed import world as ranks
from bgen.distributed.signals import StopSignals
from bgen.track.output import RECORD, RunOutput, run_identifier
from bgen.track.throughput import Throughput
from bgen.train import restore
from bgen.train.ema import EMA
from bgen.train.engine import Engine, batch_plan
from bgen.train.schedules import learning_rate
from bgen.train.stage import Stage
from bgen.train.state import RunState


@dataclass
class TrainResult:
    """How training ended.

    Attributes
    ----------
    step
        Optimiser steps done, over all restarts.
    losses
        Mean ``loss`` over the global batch at each step that this call ran; NaN where it was skipped.
    best
        Lowest held-out loss of the stage's monitor, None if it was never evaluated.
    stopped_early, interrupted
        Whether patience ran out; whether a signal ended it (then a checkpoint was saved and nothing else is done).
    record
        The JSONL record.
    """

    step: int
    record: Path
    losses: list[float] = field(default_factory=list)
    best: float | None = None
    stopped_early: bool = False
    interrupted: bool = False


class Trainer:
    """Trains a stage in the run folder ``config.out``.

    Raises
    ------
    UserError
        As :func:`check`, which is worth calling before a stage is built.
    """

    def __init__(self, config: Config, stage: Stage) -> None:
        self.world = check(config)
        self.config = config
        self.stage = stage
        self.out = config.out
        self.checkpoints = Checkpoints(config.out / "checkpoints", config.train.keep)
        self._losses: list[float] = []

    def fit(self, resume: bool = False) -> TrainResult:
        """Train to the last step, to the end of patience or to a signal.

        Afterwards ``stage.module`` has the weights to export (best, else moving average, else last) and
        ``stage.finish`` has been called, unless a signal interrupted the run.

        Parameters
        ----------
        resume
            Continue from the newest checkpoint that is whole; from the start if there is none yet.

        Raises
        ------
        UserError
            If the run folder holds a run and ``resume`` is False, if every checkpoint is damaged, if the data is not
            what the run began with, or after ``max_skipped`` steps in a row that were not finite.
        """
        folder: Path | None = None
        messages: list[str] = []
        if resume:
            folder, messages = restore.find(self.checkpoints)
        elif ranks.from_main((self.out / RECORD).exists() or bool(files.committed(self.checkpoints.root))):
            raise UserError(f"{self.out} already holds a run. Give --resume to go on with it, or another out=.")
        status = "FAILED"
        with StopSignals() as signals:
            self._open(folder, messages)
            try:
                interrupted = self._loop(signals)
                module = self.engine.release()
                if not interrupted:
                    self._finish(module)
                self._event("interrupted" if interrupted else "end", {"signal": signals.received})
                status = "KILLED" if interrupted else "FINISHED"
            finally:
                self.output.close(status)
        state = self.state
        return TrainResult(
            state.step, self.out / RECORD, self._losses, state.best, state.stopped_early, interrupted=interrupted
        )

    def _open(self, folder: Path | None, messages: list[str]) -> None:
        """Restore or make the state, the engine and the moving average; open the output."""
        train, module = self.config.train, self.stage.module
        if folder is None:
            self.state = RunState(ranks.from_main(run_identifier(self.config)))
            self.engine = Engine(module, train, self.world)
        else:
            self.state = restore.read_state(folder, self.stage.fingerprint)
            self.engine, converted = restore.load_engine(folder, module, train)
            messages = messages + converted
        self.ema = EMA(self.engine.module, train.ema) if train.ema > 0 else None
        self.best_weights: dict[str, Tensor] | None = None
        if folder is not None and self.ema is not None:
            self.ema.load(read_weights(folder / files.MODEL))
        if folder is not None and train.patience > 0 and (folder / files.BEST).exists():
            self.best_weights = read_weights(folder / files.BEST)
        self.output = RunOutput(
            self.config, self.state.run, None if folder is None else self.state.step, self.world.is_main
        )
        for message in messages:
            self.output.say(message)
        facts: dict[str, Any] = {"ranks": self.world.size, "device": self.world.device.type}
        if folder is None:
            parameters = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
            self._event("start", {"run": self.state.run, **facts, "parameters": parameters})
        else:
            self._event("resume", {"checkpoint": folder.name, "messages": messages, **facts})

    def _loop(self, signals: StopSignals) -> bool:
        """Run the steps that are left; returns whether a signal ended them."""
        train, state = self.config.train, self.state
        batches = self.stage.train_batches(state.step)
        first = state.step
        self.engine.train()
        self.throughput = Throughput()
        while state.step < train.steps and not state.stopped_early:
            begin = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - begin
            asked_to_stop = self._step(micro_batches, waited, signals)
            if state.step == first + 1:
                ranks.set_timeout(train.step_timeout)
            last = state.step == train.steps
            if state.step % train.log_every == 0 or last:
                self._log()
            begin = time.perf_counter()
            if train.eval_every and (state.step % train.eval_every == 0 or last):
                self._validate()
            if state.step % train.checkpoint_every == 0 or last or state.stopped_early or asked_to_stop:
                self._save(must=asked_to_stop)
            self.throughput.pause(time.perf_counter() - begin)
            if asked_to_stop and not (last or state.stopped_early):
                self.output.say(f"stopped by a signal at step {state.step}: saved; go on with --resume")
                return True
        return False

    def _step(self, micro_batches: Sequence[CellBatch], waited: float, signals: StopSignals) -> bool:
        """One optimiser step on the global batch; returns whether any rank was asked to stop."""
        train, state = self.config.train, self.state
        _seed(self.config.seed, state.step, self.world.rank)
        sums: dict[str, Tensor] = {}
        unfinite: list[Tensor] = []
        for batch in micro_batches:
            losses = self.engine.forward(batch.to(self.world.device))
            self.engine.backward(losses["loss"].float().mean())
            for name, loss in losses.items():
                total = loss.detach().double().sum()
                sums[name] = sums[name] + total if name in sums else total
            unfinite.append(~losses["loss"].detach().isfinite())
        rate = learning_rate(train, state.step)
        outcome = self.engine.step(rate)

        names = sorted(sums)
        cells = sum(len(batch) for batch in micro_batches)
        nonzeros = sum(len(batch.counts) for batch in micro_batches)
        here = [float(cells), float(nonzeros), waited, float(signals.received is not None)]
        local = torch.cat([torch.tensor(here, dtype=torch.float64), torch.stack([sums[name] for name in names]).cpu()])
        cells_all, nonzeros_all, waited_all, stop, *totals = ranks.all_sum(local).tolist()
        means = {name: total / cells_all for name, total in zip(names, totals, strict=True)}
        self.throughput.add(int(cells_all), int(nonzeros_all), waited_all / self.world.size)

        state.step += 1
        self._losses.append(means["loss"] if outcome.applied else math.nan)
        if outcome.applied:
            state.skipped_in_row = 0
            if self.ema is not None:
                self.ema.update(self.engine.module, state.step - 1)
            state.add({**means, "lr": rate, "grad_norm": outcome.grad_norm})
        else:
            self._skipped(micro_batches, unfinite)
        self.output.progress(state.step)
        return stop > 0

    def _skipped(self, micro_batches: Sequence[CellBatch], unfinite: list[Tensor]) -> None:
        """Note a step that was not applied, and its cells; end the run if there were too many in a row."""
        train, state = self.config.train, self.state
        state.skipped += 1
        state.skipped_in_row += 1
        pairs = list(zip(micro_batches, unfinite, strict=True))
        guilty = [cell for batch, mask in pairs for cell in batch.cells[mask.cpu()].tolist()]
        by_rank = ranks.gather((guilty, [cell for batch, _ in pairs for cell in batch.cells.tolist()]))
        cells = [cell for found, _ in by_rank for cell in found]
        reason = "loss" if cells else "gradient"
        cells = cells or [cell for _, everything in by_rank for cell in everything]
        self._event("skipped", {"reason": reason, "cells": cells})
        self.output.say(f"step {state.step} skipped: {reason} not finite ({state.skipped_in_row} in a row)")
        if state.skipped_in_row >= train.max_skipped:
            raise UserError(
                f"{state.skipped_in_row} steps in a row had a {reason} that was not finite, the last was step "
                f"{state.step}. Their cells are in {self.out / RECORD} (event 'skipped'): look at them. Or lower "
                f"train.learning_rate ({train.learning_rate:g}) or raise train.warmup, and go on with --resume."
            )

    def _log(self) -> None:
        means = self.state.take_means()
        figures = self.throughput.report()
        self.output.row("train", self.state.step, {**means, "skipped": self.state.skipped, **figures})
        loss = f"loss {means['loss']:.4g} " if means else ""
        self.output.progress(self.state.step, f"{loss}{figures['cells_per_s']:,.0f} cells/s")

    @torch.no_grad()
    def _validate(self) -> None:
        """Held-out losses, of the moving average where there is one."""
        state, monitor = self.state, self.stage.monitor
        self.engine.train(False)
        sums: dict[str, Tensor] = {}
        weights = torch.zeros((), dtype=torch.float64)
        average = self.ema.swapped_in(self.engine.module) if self.ema is not None else contextlib.nullcontext()
        with average:
            for batch, weight in self.stage.valid_batches():
                losses = self.engine.forward(batch.to(self.world.device))
                weight = weight.to(self.world.device, torch.float64)
                weights = weights + weight.sum().cpu()
                for name, loss in losses.items():
                    # Padding may hold anything, also what is not finite.
                    total = torch.where(weight > 0, loss.double() * weight, 0.0).sum()
                    sums[name] = sums[name] + total if name in sums else total
            if monitor not in sums:
                raise UserError(f"the held-out losses have no '{monitor}' to watch.{nearest(monitor, sums)}")
            names = sorted(sums)
            *totals, weight_all = ranks.all_sum(
                torch.cat([torch.stack([sums[name] for name in names]).cpu(), weights[None]])
            ).tolist()
            means = {name: total / weight_all for name, total in zip(names, totals, strict=True)}
            if state.evaluated(means[monitor], self.config.train.patience) and self.config.train.patience > 0:
                module = self.engine.module
                self.best_weights = {name: t.detach().cpu().clone() for name, t in module.state_dict().items()}
        self.engine.train()
        self.output.row("valid", state.step, means)

    def _save(self, must: bool) -> None:
        """Commit a checkpoint. A failure is reported and training goes on, unless the run ends here (``must``)."""
        self.output.sync()
        facts = {"ranks": self.world.size, "zero": self.config.train.zero}
        try:
            self.checkpoints.save(self.state.step, self._write, facts)
        except SaveError as error:
            if must:
                raise UserError(f"stopped at step {self.state.step} without saving: {error}") from error
            self._event("save failed", {"reason": str(error)})
            self.output.say(f"warning: no checkpoint at step {self.state.step}: {error}")

    def _write(self, folder: Path) -> list[Path]:
        written = self.engine.save(folder)
        if self.world.is_main:
            weights = dict(self.engine.module.state_dict())
            if self.ema is not None:
                weights |= self.ema.weights
            write_weights(weights, folder / files.MODEL)
            written.append(folder / files.MODEL)
            if self.best_weights is not None:
                write_weights(self.best_weights, folder / files.BEST)
                written.append(folder / files.BEST)
            tree = {
                "state": self.state.to_json(),
                "fingerprint": self.stage.fingerprint,
                "config": self.config.model_dump(mode="json"),
            }
            (folder / files.STATE).write_text(json.dumps(tree, indent=1, allow_nan=False), encoding="utf-8")
            written.append(folder / files.STATE)
        return written

    def _finish(self, module: nn.Module) -> None:
        """Leave the module with the weights to export, and let the stage do what it does at the end."""
        if self.best_weights is not None:
            module.load_state_dict(self.best_weights)
        elif self.ema is not None:
            self.ema.copy_to(module)
        module.eval()
        self.stage.finish(module)

    def _event(self, event: str, values: dict[str, Any]) -> None:
        self.output.event(event, self.state.step, values)


def check(config: Config) -> ranks.World:
    """Meet the other ranks and check what can be checked before a stage is built; returns this rank's place.

    Raises
    ------
    UserError
        If the global batch cannot be split, or patience is set without evaluations.
    """
    batch_plan(config.train, ranks.read_world().size)
    if config.train.patience > 0 and config.train.eval_every == 0:
        raise UserError(
            f"train.patience={config.train.patience} needs held-out losses, but train.eval_every=0 turns them off. "
            "Set train.eval_every, or train.patience=0."
        )
    return ranks.start(config.train.start_timeout)


def _seed(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one rank, so that dropout is the same after a restart without saving any state."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
