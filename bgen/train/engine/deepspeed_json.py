"""From our settings to DeepSpeed's JSON: batches, optimiser, ZeRO and offload, precision, and what a user adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bgen.config.train import TrainConfig
from bgen.errors import UserError

# Elements per communication bucket: DeepSpeed's default of 5e8 reserves 2 GB whatever the model's size.
BUCKET = 50_000_000

OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer, train.learning_rate, train.betas and train.weight_decay",
    "scheduler": "train.schedule",
    "zero_optimization.stage": "train.zero",
    "zero_optimization.offload_optimizer": "train.offload.optimizer",
    "zero_optimization.offload_param": "train.offload.parameters",
    "fp16": "train.precision (there is no float16)",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "communication_data_type": "train.reduce_precision",
    "checkpoint": "train.checkpoint_every (bgen writes its own checkpoints)",
    "comms_logger.enabled": "train.comms_log",
    "flops_profiler.enabled": "train.flops_profile",
}
"""Settings of DeepSpeed to those of ours that they follow from; a user's JSON may repeat but not change them."""


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is computed: ``micro`` cells at a time on each rank, ``accumulation`` times."""

    micro: int
    accumulation: int


def batch_plan(config: TrainConfig, world_size: int) -> BatchPlan:
    """Split the global batch over ranks and micro batches; one that is not chosen yet (auto) is a rank's whole share.

    Raises
    ------
    UserError
        If it does not divide evenly; the message names the nearest values that do.
    """
    total, micro = config.global_batch, config.cells_at_a_time
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


def deepspeed_config(config: TrainConfig, world_size: int, out: Path | None = None) -> dict[str, Any]:
    """Return DeepSpeed's JSON configuration for ``config`` on ``world_size`` ranks.

    Parameters
    ----------
    config
        Settings.
    world_size
        Number of ranks.
    out
        Run folder, for what DeepSpeed's profiler writes.

    Raises
    ------
    UserError
        If settings contradict each other, all of them in one message, or ``train.deepspeed`` contradicts them.
    """
    _check(config)
    plan = batch_plan(config, world_size)
    tree: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.clip,
        "optimizer": _optimizer(config),
        "zero_optimization": _zero(config),
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        # Parameters stay float32; with no "lower precision safe" modules, gradients are reduced in float32 as well.
        tree["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif config.precision == "pure_bf16":
        tree["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # Inputs are float32; autocast brings them to the parameters.
        tree["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if config.reduce_precision == "bf16":
        tree["communication_data_type"] = "bf16"  # under autocast, engine.py says it of each parameter
    if config.offload.optimizer != "none":
        # DeepSpeed's own CPU Adam is compiled at first use; torch's needs no compiler.
        tree["zero_force_ds_cpu_optimizer"] = False
    if config.comms_log:
        tree["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True}
    if config.flops_profile:
        tree["flops_profiler"] = {"enabled": True, "profile_step": config.flops_profile, "detailed": True}
        if out is not None:
            tree["flops_profiler"]["output_file"] = str(out / "flops.txt")
    if config.deepspeed is not None:
        tree = _merge(tree, _read(config.deepspeed), config.deepspeed)
    return tree


def _check(config: TrainConfig) -> None:
    offload, wrong = config.offload, []
    if config.precision == "pure_bf16" and config.zero == 0:
        wrong.append("train.precision=pure_bf16 accumulates gradients in float32 only with train.zero=1 to 3")
    if config.optimizer == "muon" and config.zero == 0:
        wrong.append("train.optimizer=muon needs train.zero=1 to 3: without ZeRO it clips before it orthogonalises")
    if offload.optimizer == "cpu" and config.zero == 0:
        wrong.append("train.offload.optimizer=cpu needs train.zero=1 to 3")
    if offload.optimizer == "nvme" and config.zero != 3:
        wrong.append("train.offload.optimizer=nvme needs train.zero=3")
    if offload.parameters != "none" and config.zero != 3:
        wrong.append(f"train.offload.parameters={offload.parameters} needs train.zero=3")
    if "nvme" in (offload.optimizer, offload.parameters) and offload.folder is None:
        wrong.append("offloading to nvme needs train.offload.folder, a folder on a local NVMe disk")
    if offload.optimizer == "nvme" and config.ema > 0:
        wrong.append("train.ema would read the weights back from NVMe at every step: offload to cpu, or set it to 0")
    if config.optimizer == "muon" and offload.optimizer != "none":
        wrong.append("train.optimizer=muon keeps its state on the accelerator: set train.offload.optimizer=none")
    if wrong:
        raise UserError("The training settings contradict each other:\n  " + "\n  ".join(wrong))


def _optimizer(config: TrainConfig) -> dict[str, Any]:
    # torch's own AdamW: DeepSpeed's is compiled at first use, and that build hangs where it was once killed.
    common = {"torch_adam": True, "lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "muon":
        return {"type": "Muon", "params": common | {"betas": list(config.betas), "momentum": 0.95}}
    params = common | {"betas": list(config.betas)}
    if config.optimizer == "fused_adamw":
        params["fused"] = True
    return {"type": "AdamW", "params": params}


def _zero(config: TrainConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "stage": config.zero,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.zero == 3 and config.optimizer == "muon":
        tree["reduce_scatter"] = False  # Muon needs whole gradients
    for name, place in (("offload_optimizer", config.offload.optimizer), ("offload_param", config.offload.parameters)):
        if place != "none":
            tree[name] = {"device": place}
        if place == "nvme":
            tree[name]["nvme_path"] = str(config.offload.folder)
    return tree


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"train.deepspeed: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"train.deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"train.deepspeed: {path} must hold an object, {{...}}.")
    return tree


def _merge(ours: dict[str, Any], theirs: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Merge a user's tree over ours; a value that would change one of :data:`OWNED` is an error."""
    wrong = []

    def merge(base: dict[str, Any], over: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        merged = dict(base)
        for name, value in over.items():
            place = prefix + name
            old = base.get(name)
            if place in OWNED:
                if value != old:
                    wrong.append(f"{place}: set {OWNED[place]} instead")
            elif isinstance(value, Mapping):
                merged[name] = merge(old if isinstance(old, dict) else {}, value, f"{place}.")
            else:
                merged[name] = value
        return merged

    tree = merge(ours, theirs, "")
    if wrong:
        raise UserError(f"{path} contradicts the configuration:\n  " + "\n  ".join(wrong))
    return tree
