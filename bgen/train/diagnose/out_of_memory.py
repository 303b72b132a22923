"""When memory runs out: which setting to change, with the sizes at hand, and on CUDA a picture of the memory.

DeepSpeed says no more than torch does, so its error is caught where torch's is.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

import psutil
import torch
from torch import nn

from bgen.config.finetune import FinetuneConfig
from bgen.config.run import Config, RunConfig
from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.distributed.world import World
from bgen.errors import UserError, memory_ran_out
from bgen.track.devices import device_name

HISTORY_STEPS = 3
"""Steps at the start whose allocations are remembered, on CUDA: that is where memory runs out, as a rule. To remember
the place in the code of every allocation costs time, so later steps do not."""

HISTORY = 50_000
"""Allocations that are remembered, at most."""


class MemoryWatch:
    """Within it, an error that says that no memory was left becomes one that says what to do.

    Parameters
    ----------
    config
        Settings of the run.
    module
        What is trained.
    world
        This rank's place.
    """

    def __init__(self, config: RunConfig, module: nn.Module, world: World) -> None:
        self.config, self.module, self.world = config, module, world
        self.snapshot = config.out / "memory" / f"rank_{world.rank}.pickle"
        self._at = "while training was set up"
        self._cells = 0
        self._left = HISTORY_STEPS if world.device.type == "cuda" else 0

    def __enter__(self) -> Self:
        if self._left:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY, stacks="python")
        return self

    def computing(self, step: int, batch: CellBatch | PackedBatch) -> None:
        """Say that a micro batch of the step of this number is computed next."""
        self._at = f"at step {step}, with {len(batch):,} cells at a time ({len(batch.counts):,} counts that are not 0)"
        self._cells = len(batch)

    def done(self) -> None:
        """Say that a step is done."""
        if self._left:
            self._left -= 1
            if not self._left:
                torch.cuda.memory._record_memory_history(enabled=None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and memory_ran_out(error):
            raise self.told(error) from error
        if self._left:
            torch.cuda.memory._record_memory_history(enabled=None)

    def told(self, error: BaseException) -> UserError:
        """Return the error that says what to do."""
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        said = str(error).strip().partition("\n")[0]
        lines = [
            f"Rank {self.world.rank} ran out of memory {self._at}, on {self._place()}, with a network of "
            f"{parameters:,} parameters: {said or type(error).__name__}",
            "Change one of these settings, the first ones first:",
            *(f"  {line}" for line in advice(self.config, self._cells, self.world)),
        ]
        if self.world.device.type == "cuda" and (picture := self._picture()):
            lines.append(picture)
        return UserError("\n".join(lines))

    def _place(self) -> str:
        device = self.world.device
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            ours = torch.cuda.memory_allocated(device)
            return f"{device_name(device)} ({gigabytes(total)}, {gigabytes(free)} free, {gigabytes(ours)} in tensors)"
        memory, ours = psutil.virtual_memory(), psutil.Process().memory_info().rss
        sizes = f"{gigabytes(memory.total)}, {gigabytes(memory.available)} free, {gigabytes(ours)} in this process"
        return f"{device.type} ({sizes})"

    def _picture(self) -> str | None:
        """Write what torch knows of the device's memory; a disk that takes no file hides nothing else."""
        part = self.snapshot.with_suffix(".part")
        with contextlib.suppress(OSError, RuntimeError):
            self.snapshot.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(part))
            part.replace(self.snapshot)
            return f"What took the memory: {self.snapshot}, which https://pytorch.org/memory_viz opens."
        return None


def advice(config: RunConfig, cells: int, world: World) -> list[str]:
    """Return settings that make a rank need less memory, each with what it is now; what costs least comes first.

    Parameters
    ----------
    config
        Settings of the run.
    cells
        Of a micro batch; 0: nothing was computed yet.
    world
        This rank's place.
    """
    train, found = config.train, []
    trajectories = config.data.trajectories if isinstance(config, Config) else None
    unit = trajectories.size if trajectories is not None else 1
    smaller = smaller_micro_batch(train.global_batch // world.size, cells, unit)
    if smaller:
        found.append(f"train.micro_batch={smaller} (cells at a time, now {cells}): the same training in more parts")
    elif cells > 1 and trajectories is not None:
        now = f"now {trajectories.times} x {trajectories.cells}"
        found.append(f"data.trajectories.times and cells ({now}): one trajectory is put through at a time already")
    if train.precision == "float32" and world.device.type == "cuda":
        found.append("train.precision=bf16 (now float32)")
    found += _of_the_network(config)
    if world.size > 1 and train.zero < 3:
        found.append(
            f"train.zero={max(2, train.zero + 1)} (now {train.zero}): ranks share what they keep of the weights"
        )
    if world.device.type == "cuda" and train.offload.optimizer == "none" and train.zero > 0:
        found.append("train.offload.optimizer=cpu (now none): slower")
    if isinstance(config, Config) and world.device.type == "cpu":
        data = config.data
        found.append(f"data.prefetch and data.window (now {data.prefetch} and {data.window}): less is read ahead")
    return found


def smaller_micro_batch(share: int, cells: int, unit: int = 1) -> int | None:
    """Return the largest micro batch of at most half of ``cells`` cells that divides a rank's ``share`` of the batch.

    Parameters
    ----------
    share, cells
        Cells of a rank in a step, and at a time now.
    unit
        Cells of a trajectory, which stay together.
    """
    parts = share // unit
    return max((n * unit for n in range(1, cells // unit // 2 + 1) if parts % n == 0), default=None)


def _of_the_network(config: RunConfig) -> list[str]:
    """Settings of what is trained; the shape of a model that is fine-tuned cannot be set."""
    if isinstance(config, FinetuneConfig):
        return []
    assert isinstance(config, Config)
    vae, backbone = config.vae, config.flow.backbone
    prefix, part = ("vae", vae) if config.stage == "vae" else ("flow.backbone", backbone)
    again = [] if part.recompute else [f"{prefix}.recompute=true (now false): slower, with less kept of each block"]
    if config.stage == "vae":
        return [*again, f"vae.hidden (now {vae.hidden}): a smaller network"]
    return [*again, f"flow.backbone.width and layers (now {backbone.width} and {backbone.layers}): a smaller network"]


def gigabytes(size: float) -> str:
    """Write bytes as gigabytes."""
    return f"{size / 1e9:.3g} GB"
