"""DeepSpeed behind a few verbs: forward, backward, step, and the weights in and out. The only file that imports it.

deepspeed takes seconds to import, so it is imported when an engine is made.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bgen.checkpoint.shards import FIXED, Shards
from bgen.config.train import TrainConfig
from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.distributed.world import World
from bgen.train.engine.deepspeed_json import deepspeed_config
from bgen.train.engine.parameter_groups import parameter_groups
from bgen.train.engine.partition import Partition
from bgen.train.stages.stage import ChecksBatches

Pieces = dict[tuple[str, int], Tensor]
"""Flat pieces of parameters by name and first element, as :meth:`Partition.weights` returns them."""


@dataclass(frozen=True)
class StepOutcome:
    """``applied`` is False where a gradient was not finite; then ``grad_norm`` is not either."""

    applied: bool
    grad_norm: float


def moved(module: nn.Module, batch: CellBatch | PackedBatch, device: torch.device) -> CellBatch:
    """Return a batch on a device, unpacked there, once the module has looked at what it must; see :class:`Engine`."""
    if device.type != "cpu" and isinstance(batch, CellBatch) and isinstance(module, ChecksBatches):
        module.check_batch(batch)
    there = batch.to(device)
    return there.to_csr() if isinstance(there, PackedBatch) else there


class Engine:
    """A module under DeepSpeed: distributed, in the configured precision, with its optimiser.

    Parameters
    ----------
    module
        Moved to the rank's device; every rank receives rank 0's initial parameters.
    config
        Settings.
    world
        This rank's place; the process group has been started.
    out
        Run folder, for what DeepSpeed's profiler writes.
    saved
        A checkpoint to go on from, of any number of ranks and ZeRO stage.
    """

    def __init__(
        self, module: nn.Module, config: TrainConfig, world: World, out: Path | None = None, saved: Shards | None = None
    ) -> None:
        self.config = config
        self.world = world
        tree = deepspeed_config(config, world.size, out)
        if saved is not None:
            fixed = {name: saved.whole(FIXED, name) for name in saved.names(FIXED)}
            module.load_state_dict(fixed, strict=False)
        # ZeRO 3 leaves frozen parameters in parts, pure_bf16 rounds them; they never change: a copy from before serves.
        # Elsewhere they stay whole where they are: a copy would cost every rank of a host as much memory again.
        changes = config.zero == 3 or config.precision == "pure_bf16"
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._frozen = {name: p.detach().cpu().clone() for name, p in frozen.items()} if changes else {}
        self._frozen_names = tuple(frozen)
        self.frozen_bytes = sum(p.numel() * p.element_size() for p in frozen.values())
        if config.reduce_precision == "bf16":
            for parameter in module.parameters():
                if parameter.requires_grad:
                    # DeepSpeed (0.19.8) looks here once autocast was on in a process, and at its setting before.
                    parameter.comm_dtype = torch.bfloat16  # type: ignore[attr-defined]
        deepspeed = _start_deepspeed(world)
        self._gathered = deepspeed.zero.GatheredParameters
        self._gradient = deepspeed.utils.safe_get_full_grad
        self._log_summary = deepspeed.comm.log_summary
        self._timers = deepspeed.comm.comm.timers
        self._communicating: dict[str, float] = {}  # milliseconds
        self._linear = torch.nn.functional.linear
        with _quiet(), contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=parameter_groups(module, config.weight_decay),
                config=tree,
                dist_init_required=False,
            )
            if config.zero == 0 and world.size == 1:
                self._engine.enable_backward_allreduce = False  # alone, it would only copy everything twice
            self.module: nn.Module = self._engine.module
            if world.size > 1:
                share_buffers(self.module)
            self.partition = Partition(self._engine, self.module, config.zero)
            if saved is not None:
                self.partition.restore(saved)
                self.put(self.partition.weights())

    def moved(self, batch: CellBatch | PackedBatch) -> CellBatch:
        """Return a batch on this rank's device, unpacked there, once the module has looked at what it must.

        Raises
        ------
        UserError
            If the module cannot take the batch.
        """
        return moved(self.module, batch, self.world.device)

    def forward(self, batch: CellBatch) -> dict[str, Tensor]:
        """The module's per-cell losses ``{name: [B]}``, in the configured precision."""
        with _quiet():
            losses: dict[str, Tensor] = self._engine(batch)
        return losses

    def backward(self, loss: Tensor, spoil: bool = False) -> None:
        """Add the gradient of a micro batch's mean ``loss``; the last one of a step also reduces over ranks.

        A loss that is not finite makes all its gradients NaN, even where the formula would have hidden it; so does
        ``spoil``. The reduction carries NaN to every rank, so :meth:`step` decides the same way everywhere, and nothing
        waits here.
        """
        good = loss.detach().isfinite() & (not spoil)
        poison = torch.where(good, 1.0, float("nan"))
        with _quiet():
            self._engine.backward(loss * poison)
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()  # counts the micro batch, no more

    def step(self, learning_rate: float) -> StepOutcome:
        """Update the weights with the gradients collected, unless one of them, on any rank, is not finite."""
        engine = self._engine
        for group in engine.optimizer.param_groups:
            scale = group.get("lr_scale", 1.0) * (self.config.muon_ratio if group.get("use_muon") else 1.0)
            group["lr"] = learning_rate * scale
        if self.config.zero == 0:
            # Without ZeRO, DeepSpeed does not look: AdamW would take the NaN in and keep it for ever.
            norm = float(nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
            if norm != norm or norm == float("inf"):
                engine.zero_grad()
                engine.micro_steps += 1
                engine.global_steps += 1
                engine.skipped_steps += 1
                return StepOutcome(False, norm)
            engine.step()
            if self.config.comms_log:
                self._time_communication()
            return StepOutcome(True, norm)
        with _quiet():
            engine.step()
        if self.config.comms_log:
            self._time_communication()
        return StepOutcome(bool(engine.was_step_applied()), float(engine.get_global_grad_norm()))

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each trained parameter's gradient in its shape, over the cells of all ranks, before it is clipped.

        All ranks go through them together, after the last backward pass of a step and before :meth:`step`. DeepSpeed's
        own function puts them together from where each ZeRO stage and offload keeps them, one parameter at a time.
        """
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                with _quiet():
                    gradient = self._gradient(parameter)
                if gradient is not None:
                    yield name, gradient

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def buffers(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of the buffers that the model's state holds; those that follow from settings do not."""
        names = {name for name, _ in self.module.named_buffers()}
        return {name: t.detach().to("cpu", copy=True) for name, t in self.module.state_dict().items() if name in names}

    def frozen(self) -> dict[str, Tensor]:
        """Return the frozen parameters on the CPU, as they came; the same tensors, where they lie there."""
        if self._frozen:
            return dict(self._frozen)
        return {name: p.detach().cpu() for name, p in self.module.named_parameters() if name in self._frozen_names}

    @torch.no_grad()
    def put(self, pieces: Pieces) -> None:
        """Make the module compute with these weights; all ranks call it together.

        The optimiser's own float32 weights stay (at ZeRO 0 there are no others than the module's).
        """
        parameters = dict(self.module.named_parameters())
        for name, whole in self._whole(pieces):
            parameter = parameters[name]
            with _quiet(), self._gathered([parameter], modifier_rank=0, enabled=self.config.zero == 3):
                if self.config.zero != 3 or self.world.is_main:
                    parameter.copy_(whole)

    @contextlib.contextmanager
    def swapped_in(self, pieces: Pieces | None) -> Iterator[None]:
        """Within the context the module computes with ``pieces`` (None: with its own weights)."""
        if pieces is None:
            yield
            return
        own = self.partition.weights()
        if self.config.zero == 0:
            own = {place: tensor.clone() for place, tensor in own.items()}
        self.put(pieces)
        try:
            yield
        finally:
            self.put(own)

    def _whole(self, pieces: Pieces) -> Iterator[tuple[str, Tensor]]:
        """Each trained parameter in its shape, from all ranks' pieces: ``(name, tensor)`` one after the other."""
        by_name: dict[str, list[tuple[int, Tensor]]] = {}
        for (name, start), values in pieces.items():
            by_name.setdefault(name, []).append((start, values))
        for name, shape in self.partition.shapes.items():
            whole = torch.zeros(torch.Size(shape).numel(), device=self.world.device)
            for start, values in by_name.get(name, []):
                whole[start : start + len(values)] = values
            if self.config.zero > 0 and self.world.size > 1:
                dist.all_reduce(whole)
            yield name, whole.reshape(shape)

    def _time_communication(self) -> None:
        """Take down the time of a step's collectives and set DeepSpeed's timers back.

        DeepSpeed (0.19.8) never resets them, and notes at each call the time of all calls so far.
        """
        for name, timer in self._timers.get_timers().items():
            self._communicating[name] = self._communicating.get(name, 0.0) + timer.elapsed(reset=True)

    def communication(self) -> dict[str, dict[str, float]] | None:
        """What DeepSpeed counted of its collectives: calls, bytes and milliseconds by kind; None if not asked to."""
        if not self.config.comms_log:
            return None
        self._time_communication()
        summary = self._log_summary(return_dict=True)["summary"]
        return {
            kind: {
                "calls": sum(row["count"] for row in rows.values()),
                "bytes": sum(row["count"] * row["msg_size_bytes"] for row in rows.values()),
                "ms": round(self._communicating.get(kind, 0.0), 3),
            }
            for kind, rows in summary.items()
        }

    def release(self, pieces: Pieces | None = None) -> nn.Module:
        """End the engine and return the bare module with ``pieces`` (None: its own weights) in float32, on all ranks.

        Every parameter is new and has its own storage, because those of the engine carry DeepSpeed's marks and buffers.
        """
        whole = {name: t.clone() for name, t in self._whole(self.partition.weights() if pieces is None else pieces)}
        whole |= {name: tensor.to(self.world.device) for name, tensor in self._frozen.items()}
        with _quiet():
            self._engine.destroy()
        torch.nn.functional.linear = self._linear  # ZeRO 3 puts one of its own there, for every module of the process
        fresh: dict[int, nn.Parameter] = {}
        for name, parameter in self.module.named_parameters():
            data = whole[name] if name in whole else parameter.detach().clone()
            fresh[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
        for module in self.module.modules():
            # ZeRO 3 puts a dictionary of its own in place of the module's, which fetches parameters on access.
            kept = vars(module).pop("_original_parameters", module._parameters)
            module._parameters = {name: p if p is None else fresh[id(p)] for name, p in kept.items()}
        return self.module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch deprecates collectives that DeepSpeed calls; nothing that a user of bgen could act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """Hide MLflow from DeepSpeed, whose autotuner would import it: that is half of DeepSpeed's start."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["mlflow"]


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Let DeepSpeed's Muon, which it imports at every ZeRO stage, compile its functions when one of them is called.

    As they are, they import torch's compiler, which takes as long as all of torch.
    """
    from deepspeed.runtime import compiler

    if (before := getattr(compiler, "compile", None)) is None:  # DeepSpeed 0.18 compiles none of them
        yield
        return
    compiler.compile = lambda: _compiled_when_called
    try:
        yield
    finally:
        compiler.compile = before


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes its own place in its module, compiled, at its first call, with all others there."""
    there = vars(sys.modules[function.__module__])

    @functools.wraps(function)
    def first(*args: Any, **options: Any) -> Any:
        for name, waiting in list(there.items()):
            if hasattr(waiting, "bgen_waits"):
                there[name] = torch.compile(waiting.bgen_waits)
        return there[function.__name__](*args, **options)

    first.bgen_waits = function  # type: ignore[attr-defined]
    return first


def import_deepspeed() -> Any:
    """Import DeepSpeed and what of it is used here, without what it would import besides."""
    with _quiet(), _without_mlflow():
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops

        with _compiling_later():
            import deepspeed.runtime.zero.muon.muon_optimizer
    return deepspeed


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0; DeepSpeed does so with parameters only.

    What is computed at the start, such as singular vectors, can differ from one kind of processor to another.
    """
    for buffer in module.buffers():
        flat = buffer.detach().reshape(-1).contiguous()
        torch.distributed.broadcast(flat.view(torch.uint8), src=0)
        buffer.copy_(flat.view_as(buffer))


def _start_deepspeed(world: World) -> Any:
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = import_deepspeed()
    # What matters of its warnings (skipped steps), the record says in our words.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPU hosts this op is compiled at every first start, for minutes, and a build that was killed leaves a lock at
    # which every later start waits for ever. Setting the whole table also spares the probing of all compilers.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}
    deepspeed.comm.init_distributed(dist_backend="gloo" if world.device.type == "cpu" else "nccl", verbose=False)
    return deepspeed
