"""``train.micro_batch: auto``: the largest micro batch that fits into the memory of every rank, found before step 1.

A rank's share of the global batch is tried whole, then halved and halved again. Each trial is a forward and a backward
pass over the first batch, on a copy of the network that is thrown away: no engine, no optimiser and no moving average
exists yet, nothing is recorded, and the state of torch's random numbers is put back. What a pass took is measured, and
what the run keeps besides (optimiser, float32 weights, averages) is added by the formulas of ``bgen plan``. No rank
waits for another within a trial, so one whose memory runs out holds up none; afterwards the ranks agree.

DeepSpeed's autotuner is not used: it starts a whole job for each setting that it tries, changes the ZeRO stage as well,
leaves folders of results, and knows nothing of trajectories, which must stay whole.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bgen.config.run import RunConfig
from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.distributed import world as ranks
from bgen.distributed.world import World
from bgen.errors import UserError, memory_ran_out
from bgen.nn.memory import LiveBytes, free_on, give_back
from bgen.track import record as records
from bgen.track.output import RECORD
from bgen.train.engine.deepspeed_json import batch_plan
from bgen.train.engine.engine import moved
from bgen.train.engine.memory import memory
from bgen.train.stages.stage import SplitsBatches, Stage

FILL = 0.9
"""Share of the memory that a run may take by the trials: later batches hold more counts than the first, and torch's
allocator leaves gaps."""


@dataclass(frozen=True)
class Trial:
    """A micro batch that was tried.

    Attributes
    ----------
    cells
        Its size.
    needed
        Bytes that a run would take with it, on the rank that would take most; None where memory ran out.
    fits
        Whether that fits on all ranks.
    """

    cells: int
    needed: int | None
    fits: bool


def with_micro_batch(config: RunConfig, cells: int) -> RunConfig:
    """Return settings with a micro batch of so many cells."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": cells})})


def candidates(share: int, unit: int) -> Iterator[int]:
    """Yield a rank's ``share`` of the batch, its half, and so on, as far as they hold whole trajectories (``unit``)."""
    parts = share // unit
    yield parts * unit
    while parts % 2 == 0:
        parts //= 2
        yield parts * unit


def chosen_before(rows: Sequence[dict[str, Any]], share: int, unit: int) -> int | None:
    """Return the micro batch that the record of a run says was chosen; None if there is none.

    A rank's ``share`` is another one where the number of ranks is: then the largest candidate that is no larger.
    """
    chosen = next((int(row["chosen"]) for row in reversed(rows) if row.get("event") == "micro batch"), None)
    if chosen is None:
        return None
    return next((cells for cells in candidates(share, unit) if cells <= chosen), None)


def settle(stage: Stage, config: RunConfig, world: World, *, begun: bool) -> tuple[RunConfig, list[Trial]]:
    """Return settings whose micro batch is a number where it was auto, and what was tried for that.

    Parameters
    ----------
    stage
        Afterwards it gives batches of that size.
    config
        Settings of the run.
    world
        This rank's place.
    begun
        Whether the run goes on from a checkpoint: then it keeps the size that its record has, and nothing is tried.

    Raises
    ------
    UserError
        See :func:`find_micro_batch`; or if the batch does not divide among the ranks.
    """
    if config.train.micro_batch != "auto":
        return config, []
    chosen: int | None = None
    tried: list[Trial] = []
    share = batch_plan(config.train, world.size).micro
    path = config.out / RECORD
    if begun and isinstance(stage, SplitsBatches):
        rows = records.read(path) if world.is_main and path.exists() else []
        chosen = ranks.from_main(chosen_before(rows, share, stage.unit))
    if chosen is None:
        tried = find_micro_batch(stage, config, world)
        chosen = tried[-1].cells
    config = with_micro_batch(config, chosen)
    if isinstance(stage, SplitsBatches):
        stage.split(config)
    return config, tried


def find_micro_batch(stage: Stage, config: RunConfig, world: World) -> list[Trial]:
    """Try micro batches until one fits, which is the last of what is returned; the same on all ranks.

    Parameters
    ----------
    stage
        Afterwards it gives batches of the last size.
    config
        Settings of the run.
    world
        This rank's place.

    Raises
    ------
    UserError
        If the smallest does not fit either, or the stage's batches cannot be split.
    OSError
        If the first batch cannot be read: nothing has begun yet, so nothing is waited for.
    """
    if not isinstance(stage, SplitsBatches):
        raise UserError("train.micro_batch=auto: this stage has batches of one size; give a number, or leave it out.")
    tried: list[Trial] = []
    original: nn.Module | None = None
    try:
        for cells in candidates(config.train.global_batch // world.size, stage.unit):
            smaller = with_micro_batch(config, cells)
            stage.split(smaller)
            batches = stage.train_batches(0)
            first = next(batches)[0]
            getattr(batches, "close", lambda: None)()
            if original is None:
                original = _copy(stage.module, config, world)
            needed = _needed(original, first, smaller, world)
            limit = FILL * memory_limit(world)
            fits = bool(ranks.agree_min(needed is not None and needed <= limit))
            everywhere = ranks.gather(needed)
            tried.append(Trial(cells, None if None in everywhere else max(n for n in everywhere if n), fits))
            if fits:
                return tried
    finally:
        original = None
        gc.collect()
        give_back(world.device)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)  # the record has the run's peak
    smallest = tried[-1]
    needs = "memory ran out" if smallest.needed is None else f"it needs {smallest.needed / 1e9:.3g} GB"
    raise UserError(
        f"train.micro_batch=auto: not even {smallest.cells} cells at a time fit into {limit / 1e9:.3g} GB "
        f"({FILL:.0%} of what there is): {needs}. Take a smaller network, recompute=true, more ranks with a higher "
        "train.zero, or train.offload.optimizer=cpu; at train.zero=3 no rank need hold the whole network, as it does "
        "here: give train.micro_batch a number (`bgen plan` recommends one)."
    )


def memory_limit(world: World) -> int:
    """Return the bytes that this rank may take: what is free on its GPU, or its part of what is free on the host."""
    give_back(world.device)
    ours = torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0
    return free_on(world.device, world.local_size) + ours


def _copy(module: nn.Module, config: RunConfig, world: World) -> nn.Module:
    """Return the network as the engine will have it, and leave the one that is trained alone."""
    copied = copy.deepcopy(module).to(world.device)
    if config.train.precision == "pure_bf16":
        copied.bfloat16()
    return copied.train()


def _needed(module: nn.Module, batch: CellBatch | PackedBatch, config: RunConfig, world: World) -> int | None:
    """Return the bytes that a run needs on this rank with micro batches like this one; None if memory runs out."""
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        try:
            activations = _activations(module, batch, config, world)
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
            return None
        finally:
            module.zero_grad(set_to_none=True)
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    found = memory(
        config.train,
        trained=sum(trained),
        frozen=sum(p.numel() for p in module.parameters()) - sum(trained),
        largest=max(trained, default=0),
        activations=activations,
        ranks=world.size,
        zero=config.train.zero,
        offload=config.train.offload.optimizer != "none",
    )
    return found.device if world.device.type == "cuda" else found.device + found.host


def _activations(module: nn.Module, batch: CellBatch | PackedBatch, config: RunConfig, world: World) -> int:
    """Return the bytes that live at the peak of both passes, beside weights and gradients."""

    def both_passes() -> None:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.train.precision != "float32"):
            losses: dict[str, Tensor] = module(moved(module, batch, world.device))
        losses["loss"].float().mean().backward()

    if world.device.type == "cuda":
        before = torch.cuda.memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
        both_passes()
        peak = torch.cuda.max_memory_allocated(world.device) - before
    else:
        with LiveBytes([*module.parameters(), *module.buffers()]) as live:
            both_passes()
        peak = live.peak
    gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    return max(0, peak - gradients)
