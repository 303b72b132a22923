"""The training loop: the same for every stage, every number of ranks, and before and after a restart."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bgen.checkpoint import files
from bgen.checkpoint.commit import Checkpoints
from bgen.checkpoint.ownership import Owner, owning
from bgen.config.run import RunConfig
from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.distributed import world as ranks
from bgen.distributed.signals import StopSignals
from bgen.errors import UserError
from bgen.track.devices import device_name, peak_flops
from bgen.track.output import CHECKPOINTS, RECORD, RunOutput, run_identifier
from bgen.track.progress import warn
from bgen.track.throughput import Throughput
from bgen.train import restore
from bgen.train.auto_micro_batch import settle
from bgen.train.data_outage import Batches
from bgen.train.diagnose.norms import LayerNorms
from bgen.train.diagnose.out_of_memory import MemoryWatch
from bgen.train.diagnose.profile import ProfileWindow, record_step
from bgen.train.diagnose.skipped import look_at_skipped
from bgen.train.engine.compiled import compiled
from bgen.train.engine.deepspeed_json import batch_plan, deepspeed_config
from bgen.train.engine.engine import Engine
from bgen.train.engine.kernels import require_kernels
from bgen.train.engine.schedules import learning_rate
from bgen.train.engine.step_seed import seed_step
from bgen.train.heap import keep_heap
from bgen.train.held_out_losses import held_out_losses
from bgen.train.saving import Saver, Weights
from bgen.train.stages.stage import CountsDamage, CountsFlops, Stage
from bgen.train.state import RunState
from bgen.train.step_losses import StepLosses
from bgen.train.threads import as_many_threads_as_pay
from bgen.train.watch import HostReport, Watchdog


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
        Whether patience ran out; whether a signal ended training (then a checkpoint was saved, and nothing else done).
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
        As :func:`check`, which is worth calling before a stage is built, and :func:`require_kernels`.
    """

    def __init__(self, config: RunConfig, stage: Stage) -> None:
        self.world = check(config)
        require_kernels(stage.module, self.world, config.train.compile)
        self.config = config
        self.stage = stage
        self.out = config.out
        train = config.train
        self.checkpoints = Checkpoints(
            config.out / CHECKPOINTS, train.keep, train.keep_every, train.save_timeout, self._beat
        )
        self._watchdog: Watchdog | None = None
        self._profile = ProfileWindow(train.profile, config.out, self.world, self._event)
        self.losses = StepLosses()
        self._losses: list[float] = []
        self._damage_told: list[int] = []
        self._damaged = 0
        self._held_out: float | None = None

    def fit(self, resume: bool = False, accept_changed_data: bool = False) -> TrainResult:
        """Train to the last step, to the end of patience or to a signal.

        Afterwards ``stage.module`` has the weights to export (best, else moving average, else last) and
        ``stage.finish`` has been called, unless a signal interrupted the run.

        Parameters
        ----------
        resume
            Continue from the newest whole checkpoint, or start if there is none yet. So a job that may be restarted can
            always be started with it.
        accept_changed_data
            Also continue with other data than the run began with.

        Raises
        ------
        UserError
            If the run folder holds a run and ``resume`` is False, if every checkpoint is damaged, if the data is not
            what the run began with, or after ``max_skipped`` skipped steps in a row.
        """
        ranks.set_timeout(self.config.train.start_timeout)
        self._refuse_a_second_run(resume)
        with owning(self.out) as owner:
            self._refuse_a_second_run(resume)  # another job may have been here and gone since
            self._refuse_to_restart_for_ever(owner)
            self.checkpoints.owner = owner
            folder: Path | None = None
            messages: list[str] = []
            if resume:
                folder, messages = restore.find(self.checkpoints)
            interrupted = self._fit(folder, messages, accept_changed_data)
            owner.done = not interrupted
        state = self.state
        return TrainResult(
            state.step, self.out / RECORD, self._losses, state.best, state.stopped_early, interrupted=interrupted
        )

    def _refuse_a_second_run(self, resume: bool) -> None:
        if not resume and ranks.from_main((self.out / RECORD).exists() or bool(files.committed(self.checkpoints.root))):
            raise UserError(f"{self.out} already holds a run. Give --resume to go on with it, or another out=.")

    def _refuse_to_restart_for_ever(self, owner: Owner) -> None:
        if owner.fruitless > self.config.train.max_restarts:
            raise UserError(
                f"{self.out} was restarted {owner.fruitless} times in a row without a new checkpoint "
                f"(train.max_restarts={self.config.train.max_restarts}): whatever ends it will end it again. Look at "
                "the first error in the logs of the ranks, mend that, and start again."
            )

    def _fit(self, folder: Path | None, messages: list[str], accept_changed_data: bool) -> bool:
        """Train in a folder that is this job's, from a checkpoint if there is one; whether a signal ended it."""
        self.config, self._tried = settle(self.stage, self.config, self.world, begun=folder is not None)
        if self.world.device.type == "cpu":
            keep_heap()
        status = "FAILED"
        cells = batch_plan(self.config.train, self.world.size).micro
        threads = as_many_threads_as_pay(self.stage.module, cells, self.world)
        self.memory = MemoryWatch(self.config, self.stage.module, self.world)
        with self.memory, StopSignals() as self._signals, threads:
            self._watchdog = watchdog = Watchdog(self.out / "stacks")
            self._allow(self.config.train.start_timeout)
            try:
                self._open(folder, messages, accept_changed_data)
                try:
                    with compiled(self.stage.module, self.config.train.compile):
                        interrupted = self._loop()
                    self._finish(interrupted)
                    status = "KILLED" if interrupted else "FINISHED"
                finally:
                    if self.world.size == 1:
                        self.saver.finish()  # several ranks could not wait for each other after an error of one
                    self.output.close(status)
            except RuntimeError as error:
                # Another rank died or hangs: say where this one stood.
                watchdog.dump(error)
                raise
            finally:
                watchdog.close()
                self._watchdog = None
        return interrupted

    def _allow(self, seconds: float) -> None:
        """Let whatever comes next take so long, on all ranks."""
        ranks.set_timeout(seconds)
        self._allowed = seconds
        self._beat()

    def _beat(self) -> None:
        """Say that this rank lives."""
        if self._watchdog is not None:
            self._watchdog.beat(self._allowed)

    def _open(self, folder: Path | None, messages: list[str], accept_changed_data: bool) -> None:
        """Restore or make the state, the engine and the weights beside it; open the output."""
        train, module, saved = self.config.train, self.stage.module, None
        if folder is None:
            self.state = RunState(ranks.from_main(run_identifier(self.config)))
            self.engine = Engine(module, train, self.world, self.out)
        else:
            self.state, changed = restore.read_state(folder, self.stage.fingerprint, accept_changed_data)
            self.engine, saved, converted = restore.load_engine(folder, module, train, self.out)
            messages = [*messages, *changed, *converted]
        self.norms = LayerNorms(self.engine.module, train.norms, train.compile)
        self.weights = Weights(self.engine, self.config, saved)
        self.output = RunOutput(
            self.config,
            self.state.run,
            None if folder is None else self.state.step,
            self.world,
            deepspeed=deepspeed_config(train, self.world.size, self.out),
            data=self.stage.fingerprint,
        )
        self.saver = Saver(self.checkpoints, self.config, self.stage.fingerprint, self._event, self.output)
        for message in messages:
            self.output.say(message)
        facts: dict[str, Any] = {"ranks": self.world.size, "device": self.world.device.type}
        if folder is None:
            parameters = sum(math.prod(shape) for shape in self.engine.partition.shapes.values())
            self._event("start", {"run": self.state.run, **facts, "parameters": parameters})
        else:
            self._event("resume", {"checkpoint": folder.name, "messages": messages, **facts})
        if self._tried:
            found = self._tried[-1].cells
            self._event("micro batch", {"chosen": found, "tried": [asdict(trial) for trial in self._tried]})
            self.output.say(f"train.micro_batch=auto: {found:,} cells at a time")

    def _loop(self) -> bool:
        """Run the steps that are left; returns whether a signal ended them."""
        train, state = self.config.train, self.state
        batches = Batches(
            *(self.stage, state.step, train.data_patience, train.step_timeout),
            *(self._waiting_for_data, lambda: self._signals.received is not None),
        )
        first = state.step
        self.engine.train()
        peak = peak_flops(device_name(self.world.device), train.precision)
        self.throughput = Throughput(None if peak is None else peak * self.world.size)
        self.hosts = HostReport(train.straggler_ratio, self.config.track.system)
        asked_to_stop = state.evaluating and not self._validate(batches)
        drawn: Sequence[CellBatch | PackedBatch] | None = None
        before: Sequence[CellBatch | PackedBatch] | None = None
        while state.step < train.steps and not state.stopped_early and not asked_to_stop:
            if drawn is None:
                drawn, waited = batches.next(alone=before is None and self.world.size > 1)
            self._profile.before(state.step + 1)
            with record_step(state.step + 1):
                asked_to_stop, done = self._step(drawn, before, waited, batches.given_up is not None)
            self._beat()
            if not done:
                if asked_to_stop:
                    self._save(asked_to_stop)
                continue
            drawn, before = None, drawn
            self._profile.after(state.step)
            if state.step == first + 1:
                self._allow(train.step_timeout)
            last = state.step == train.steps
            if state.step % train.log_every == 0 or last:
                self._log()
            if state.step % train.report_every == 0:
                self._report()
            begin = time.perf_counter()
            if train.eval_every and (state.step % train.eval_every == 0 or last):
                asked_to_stop = not self._validate(batches)  # at once, if a signal came already
            self._save(asked_to_stop)
            self.throughput.pause(time.perf_counter() - begin)
        if asked_to_stop and not self._complete:
            if problem := next(filter(None, ranks.gather(batches.given_up)), None):
                raise UserError(problem)
            self.output.say(f"stopped by a signal at step {state.step}: saved")
            return True
        return False

    def _step(
        self,
        drawn: Sequence[CellBatch | PackedBatch] | None,
        before: Sequence[CellBatch | PackedBatch] | None,
        waited: float,
        given_up: bool,
    ) -> tuple[bool, bool]:
        """One optimiser step on the global batch; returns whether any rank was asked to stop, and whether it was done.

        A rank that has no data (``drawn`` is None) takes those of the step ``before`` in their place and spoils its
        gradient. So the others hear of the outage where they wait for it, and no rank's weights change.
        """
        train, state = self.config.train, self.state
        stop = float(self._signals.received is not None or given_up)
        if drawn is None and self.world.size == 1:
            return stop > 0, False
        micro_batches = before if drawn is None else drawn
        assert micro_batches is not None
        seed_step(self.config.seed, state.step, self.world.rank)
        self.norms.begin(state.step + 1)
        unfinite: list[Tensor] = []
        spike, mean = False, math.nan
        computed = 0.0
        flops = 0
        for number, batch in enumerate(micro_batches, 1):
            begin = time.perf_counter()
            self.memory.computing(state.step + 1, batch)
            unpacked = self.engine.moved(batch)
            with self.norms.forward():
                losses = self.engine.forward(unpacked)
            if isinstance(self.engine.module, CountsFlops):
                flops += self.engine.module.training_flops(unpacked)
            computed += time.perf_counter() - begin
            self.losses.add(losses)
            unfinite.append(~losses["loss"].detach().isfinite())
            if train.skip_spikes and number == len(micro_batches):
                mean = ranks.all_sum(self.losses.sums["loss"].cpu()[None]).item() / train.global_batch
                spike = state.is_spike(mean, train.skip_spikes)
            self.engine.backward(losses["loss"].float().mean(), spoil=spike or drawn is None)
        self.norms.backward(self.engine.gradients)
        rate = learning_rate(train, state.step)
        outcome = self.engine.step(rate)

        cells = sum(len(batch) for batch in micro_batches)
        nonzeros = sum(len(batch.counts) for batch in micro_batches)
        damaged = self._damaged_cells()
        here = [cells, nonzeros, waited, flops, stop, drawn is None, damaged, *self.checkpoints.status()]
        everywhere = ranks.all_sum(torch.tensor(here, dtype=torch.float64)).tolist()
        cells_all, nonzeros_all, waited_all, flops_all, stop, lacking, damaged_all, written, failed = everywhere
        if lacking:
            self.losses.drop()
            self.saver.advance(int(written), int(failed))
            return stop > 0, False
        self._damaged = int(damaged_all)
        self.throughput.add(int(cells_all), int(nonzeros_all), waited_all / self.world.size, flops_all)
        self.hosts.add(waited + computed)

        state.step += 1
        if norms := self.norms.take():
            self.output.row("norms", state.step, norms)
        self.losses.close(int(cells_all), rate, outcome.grad_norm, outcome.applied)
        if outcome.applied:
            state.skipped_in_row = 0
            if train.skip_spikes:
                self._settle()
            if self.weights.average is not None:
                self.weights.average.update(self.engine.partition.weights(), state.step - 1)
        else:
            self._settle()
            self._skipped(micro_batches, unfinite, mean if spike else None)
        self.memory.done()
        self.saver.advance(int(written), int(failed))
        self.output.progress(state.step)
        return stop > 0, True

    def _settle(self) -> None:
        """Bring the losses of the last steps from the device into the state; all ranks call it together."""
        for step in self.losses.take():
            loss = step.losses["loss"]
            self._losses.append(loss if step.applied else math.nan)
            if step.applied:
                if self.config.train.skip_spikes:
                    self.state.remember(loss)
                self.state.add({**step.losses, "lr": step.learning_rate, "grad_norm": step.grad_norm})

    def _skipped(
        self, micro_batches: Sequence[CellBatch | PackedBatch], unfinite: list[Tensor], spike: float | None
    ) -> None:
        """Record a step that was not applied, and its cells; end the run if there were too many in a row."""
        train, state = self.config.train, self.state
        state.skipped += 1
        state.skipped_in_row += 1
        found = look_at_skipped(
            self.engine.module,
            lambda batch: self.engine.forward(self.engine.moved(batch)),
            *(micro_batches, unfinite, spike),
        )
        self._event("skipped", found.facts)
        self.output.say(f"step {state.step} skipped: {found.what}{found.where} ({state.skipped_in_row} in a row)")
        if state.skipped_in_row >= train.max_skipped:
            self.saver.finish()
            raise UserError(
                f"{state.skipped_in_row} steps in a row had {found.why}, the last was step "
                f"{state.step}{found.where}. Their cells are in {self.out / RECORD} (event 'skipped'): look at them. "
                f"Or lower train.learning_rate ({train.learning_rate:g}) or raise train.warmup, and go on with "
                "--resume."
            )

    def _damaged_cells(self) -> int:
        """Return how many cells of this rank were replaced so far; warn once of each damaged chunk."""
        if not isinstance(self.stage, CountsDamage):
            return 0
        for chunk in list(self.stage.damage())[len(self._damage_told) :]:
            self._damage_told.append(chunk)
            problem = self.stage.damage()[chunk]
            warn(f"rank {self.world.rank}: chunk {chunk} is skipped: {problem}")
            self._event("damaged chunk", {"chunk": chunk, "rank": self.world.rank, "problem": problem})
        return self.stage.damaged_cells()

    def _waiting_for_data(self, problem: str | None) -> None:
        if problem is not None:
            self._event("data outage", {"problem": problem})
            warn(f"rank {self.world.rank}: {problem}")
        self._beat()

    def _log(self) -> None:
        self._settle()
        means = self.state.take_means()
        figures = self.throughput.report()
        counts = {"skipped": self.state.skipped} | ({"damaged_cells": self._damaged} if self._damaged else {})
        self.output.row("train", self.state.step, {**means, **counts, **figures})
        loss = f"loss {means['loss']:.4g} " if means else ""
        loss += f"(held out {self._held_out:.4g}) " if self._held_out is not None else ""
        mfu = f" MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
        self.output.progress(self.state.step, f"{loss}{figures['cells_per_s']:,.0f} cells/s{mfu}")

    def _report(self) -> None:
        figures, slow = self.hosts.gather()
        self.output.row("hosts", self.state.step, figures)
        if slow is not None:
            self._event("straggler", slow)
            self.output.say(
                f"warning: rank {slow['rank']} on {slow['host']} is slow: {slow['seconds']:g} s of its own work per "
                f"step, the others {slow['median']:g} s"
            )

    def _validate(self, batches: Batches) -> bool:
        """Held-out losses, of the moving average where there is one; False if a signal came, or no data, before all."""
        state, train = self.state, self.config.train
        state.evaluating = True

        def stopped() -> bool:
            self._beat()
            return bool(ranks.agree_max(self._signals.received is not None))

        cells = batches.valid(stopped)
        means = None
        if cells is not None:
            with self.engine.swapped_in(self.weights.judged):
                means = held_out_losses(self.engine, cells, self.stage.monitor, stopped)
        if means is None:
            return False
        state.evaluating, self._held_out = False, means[self.stage.monitor]
        if state.evaluated(means[self.stage.monitor], train.patience) and train.patience > 0:
            self.weights.keep_best()
        self.output.row("valid", state.step, means)
        return True

    @property
    def _complete(self) -> bool:
        """Whether all is done that training was to do."""
        state = self.state
        return (state.step == self.config.train.steps or state.stopped_early) and not state.evaluating

    def _save(self, asked_to_stop: bool) -> None:
        """Save if it is time for it; after a signal, wait for it."""
        due = self.state.step % self.config.train.checkpoint_every == 0
        if not (due or self._complete or asked_to_stop):
            return
        self._settle()
        if asked_to_stop and not self._complete:
            self.saver.save_now(self.weights, self.state)
        else:
            self.saver.begin(self.weights, self.state)
        self._beat()

    def _finish(self, interrupted: bool) -> None:
        """Leave the module with the weights to export, and let the stage do what it does at the end."""
        self.saver.finish()
        self._profile.close()
        self._allow(self.config.train.save_timeout)  # what comes now is done once, and no step
        if (communication := self.engine.communication()) is not None:
            self._event("communication", communication)
        module = self.stage.module = self.weights.release()
        if not interrupted:
            module.eval()
            self.stage.finish(module)
        self._event("interrupted" if interrupted else "end", {"signal": self._signals.received})

    def _event(self, event: str, values: dict[str, Any]) -> None:
        self.output.event(event, self.state.step, values)


def check(config: RunConfig) -> ranks.World:
    """Meet the other ranks, check what can be checked before a stage is built, and return this rank's place.

    Raises
    ------
    UserError
        If settings contradict each other, the global batch cannot be split, or patience is set without evaluations.
    """
    deepspeed_config(config.train, ranks.read_world().size)
    if config.train.patience > 0 and config.train.eval_every == 0:
        raise UserError(
            f"train.patience={config.train.patience} needs held-out losses, but train.eval_every=0 turns them off. "
            "Set train.eval_every, or train.patience=0."
        )
    return ranks.start(config.train.start_timeout)
