"""DeepSpeed behind five verbs: forward, backward, step, save, load. The only file that imports deepspeed.

deepspeed takes seconds to import, so it is imported when an engine is made.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgen.config.errors import UserError
from bgen.config.schema import TrainConfig
from bgen.data.batch import CellBatch
from bgen.distributed.world import World
from bgen.train.groups import parameter_groups

# DeepSpeed names the folder inside a checkpoint after a tag; ours is always this one.
TAG = "engine"
# Elements per communication bucket: DeepSpeed's default of 5e8 reserves 2 GB whatever the model's size.
BUCKET = 50_000_000


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is computed: ``micro`` cells at a time on each rank, ``accumulation`` times."""

    micro: int
    accumulation: int


def batch_plan(config: TrainConfig, world_size: int) -> BatchPlan:
    """Split the global batch over ranks and micro batches.

    Raises
    ------
    UserError
        If it does not come out even; the message names the nearest values that do.
    """
    total, micro = config.global_batch, config.micro_batch
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    unit = world_size * (micro or 1)
    if total % unit == 0:
        share = total // world_size
        return BatchPlan(micro or share, share // (micro or share))
    legal = [value for value in (total // unit * unit, (total // unit + 1) * unit) if value > 0]
    advice = f"train.global_batch={' or '.join(map(str, legal))}"
    if micro is None:
        raise UserError(f"train.global_batch={total} does not divide among {ranks}. Nearest that does: {advice}.")
    if total % world_size == 0:
        share = total // world_size
        divisors = [value for value in range(1, share + 1) if share % value == 0]
        near = {
            max((d for d in divisors if d < micro), default=1),
            min((d for d in divisors if d > micro), default=share),
        }
        advice += f", or train.micro_batch={' or '.join(map(str, sorted(near)))}"
    raise UserError(
        f"train.global_batch={total} is not a multiple of train.micro_batch={micro} times {ranks}. "
        f"Nearest that work: {advice}."
    )


def deepspeed_config(config: TrainConfig, world_size: int, load_universal: bool = False) -> dict[str, Any]:
    """Return DeepSpeed's JSON configuration for ``config`` on ``world_size`` ranks.

    ``load_universal`` is for the one start at which a checkpoint of another number of ranks is read.
    """
    plan = batch_plan(config, world_size)
    tree: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.clip,
        "optimizer": {
            "type": "AdamW",
            # torch's own AdamW: DeepSpeed's is compiled at first use, and that build hangs where it was once killed.
            "params": {
                "torch_adam": True,
                "lr": config.learning_rate,
                "betas": list(config.betas),
                "weight_decay": config.weight_decay,
            },
        },
        "zero_optimization": {
            "stage": config.zero,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "checkpoint": {"load_universal": load_universal},
    }
    if config.precision == "bf16":
        # Parameters stay float32; with no "lower precision safe" modules, gradients are reduced in float32 as well.
        tree["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return tree


@dataclass(frozen=True)
class StepOutcome:
    """``applied`` is False where a gradient was not finite; then ``grad_norm`` is not either."""

    applied: bool
    grad_norm: float


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
    universal
        True if :meth:`load` will be given a converted checkpoint.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, world: World, universal: bool = False) -> None:
        self.config = config
        self.world = world
        tree = deepspeed_config(config, world.size, universal)
        deepspeed = _import_deepspeed(world)
        with warnings.catch_warnings():
            # torch deprecates collectives that DeepSpeed calls; nothing that a user of bgen could act on.
            warnings.simplefilter("ignore")
            self._engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=parameter_groups(module, config.weight_decay),
                config=tree,
                dist_init_required=False,
            )
        self.module: nn.Module = self._engine.module

    def forward(self, batch: CellBatch) -> dict[str, Tensor]:
        """The module's per-cell losses ``{name: [B]}``, in the configured precision."""
        losses: dict[str, Tensor] = self._engine(batch)
        return losses

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro batch's mean ``loss``; the last one of a step also reduces over ranks.

        A loss that is not finite makes all its gradients NaN, also where the formula would have hidden it. The
        reduction carries that to every rank, so :meth:`step` decides alike everywhere, and nothing waits here.
        """
        poison = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine.backward(loss * poison)
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()  # counts the micro batch, no more

    def step(self, learning_rate: float) -> StepOutcome:
        """Update the weights with the gradients collected, unless one of them, on any rank, is not finite."""
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
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
            return StepOutcome(True, norm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.step()
        return StepOutcome(bool(engine.was_step_applied()), float(engine.get_global_grad_norm()))

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def save(self, folder: Path) -> list[Path]:
        """Write weights and optimiser into ``folder``, shared by all ranks; returns the files that this rank wrote.

        Raises
        ------
        OSError, RuntimeError
            If this rank could not write; the other ranks return as usual, so the caller must agree with them.
        """
        written: list[Path] = []
        failures: list[Exception] = []
        write: Callable[..., None] = self._engine.checkpoint_engine.save

        def noted_write(state_dict: dict[str, Any], path: str) -> None:
            # Raising here would leave the other ranks waiting at DeepSpeed's barrier.
            try:
                write(state_dict, path)
                written.append(Path(path))
            except (OSError, RuntimeError) as error:
                failures.append(error)

        self._engine.checkpoint_engine.save = noted_write
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, client_state={}, save_latest=False)
        finally:
            self._engine.checkpoint_engine.save = write
        if self.world.is_main:
            # DeepSpeed puts copies of its converters beside the checkpoint.
            for script in folder.glob("zero_to_*.py"):
                script.unlink()
        if failures:
            raise failures[0]
        return written

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote on as many ranks, or what :func:`convert` made of it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine.load_checkpoint(str(folder), tag=TAG)
        # A later save must be a plain one: in universal mode DeepSpeed would leave files out.
        self._engine._config.load_universal_checkpoint = False

    def release(self) -> nn.Module:
        """End the engine and return the bare module, each parameter in storage of its own."""
        self._engine.destroy()
        for parameter in self.module.parameters():
            parameter.data = parameter.data.clone()
            parameter.grad = None
        return self.module


def needs_conversion(zero: int, saved_ranks: int, ranks: int) -> bool:
    """Whether a checkpoint written at ZeRO stage ``zero`` by ``saved_ranks`` must be converted for ``ranks``."""
    return zero > 0 and saved_ranks != ranks


def convert(folder: Path, target: Path) -> None:
    """Convert a checkpoint's engine state to the form that any number of ranks can read; on rank 0 only.

    Raises
    ------
    RuntimeError
        With DeepSpeed's output, if its converter fails.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(target / TAG)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"DeepSpeed could not convert {folder}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def _import_deepspeed(world: World) -> Any:
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops

    # What matters of its warnings (skipped steps), the record says in our words.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPU hosts this op is compiled at every first start, for minutes, and a build that was killed leaves a lock at
    # which every later start waits for ever. Setting the whole table also spares the probing of all compilers.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}
    deepspeed.comm.init_distributed(dist_backend="gloo" if world.device.type == "cpu" else "nccl", verbose=False)
    return deepspeed
