"""Settings of training: steps, batches, the optimiser, checkpoints, DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bgen.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class OffloadConfig(Section):
    """What leaves the accelerator's memory between uses."""

    optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where optimiser state and float32 weights live; cpu needs zero 1 to 3, nvme needs 3."
    )
    parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the parameters live between uses; needs zero 3."
    )
    folder: Path | None = Field(None, description="Folder on a local NVMe disk, on every host; needed by nvme.")


class TrainConfig(Section):
    """The training loop and its DeepSpeed engine (bgen/README.md, "Training")."""

    steps: PositiveInt = Field(2000, description="Optimiser steps.")
    global_batch: PositiveInt = Field(256, description="Cells per optimiser step over all ranks.")
    micro_batch: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="Cells per forward pass on one rank; default: all of the rank's share; auto: the share, or the "
        "largest half of it, half of that, ..., that fits into memory, tried before the first step.",
    )
    optimizer: Literal["adamw", "fused_adamw", "muon"] = Field(
        "adamw", description="adamw and fused_adamw are torch's; muon orthogonalises matrices, AdamW does the rest."
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    muon_ratio: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Learning rate of Muon's matrices, as a multiple of learning_rate."
    )
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = Field(0.01, description="AdamW's; norms, biases and embeddings get none.")
    warmup: NonNegativeInt = Field(100, description="Steps of linear warm-up.")
    schedule: Literal["constant", "cosine", "wsd"] = Field(
        "cosine", description="Learning rate after warm-up; wsd: constant, then linear decay."
    )
    decay: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Share of the steps in which wsd decays.")
    final_lr: Fraction = Field(
        0.05, description="Learning rate at the last step, as a fraction of the peak (cosine, wsd)."
    )
    clip: NonNegativeFloat = Field(1.0, description="Maximum gradient norm; 0 switches clipping off.")
    zero: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO stage: what is split among ranks. 1 optimiser state, 2 and gradients, 3 and parameters."
    )
    offload: OffloadConfig = OffloadConfig()
    precision: Literal["float32", "bf16", "pure_bf16"] = Field(
        "float32",
        description="bf16 is torch autocast: parameters and optimiser stay float32. pure_bf16 casts every parameter "
        "(also decay rates and norms) and keeps float32 only in the optimiser.",
    )
    reduce_precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="Numbers in which gradients travel between ranks. bf16 sends half; each rank still adds up its "
        "micro batches, clips and updates in float32. precision pure_bf16 always sends bf16.",
    )
    compile: bool = Field(
        False, description="Let torch.compile make kernels of each block: for GPUs; the first steps then take a minute."
    )
    deepspeed: Path | None = Field(
        None, description="JSON file with further DeepSpeed settings, merged over those that follow from this section."
    )
    comms_log: bool = Field(False, description="Count DeepSpeed's collectives; summary in the record at the end.")
    flops_profile: NonNegativeInt = Field(
        0, description="Step that DeepSpeed's FLOPs profiler measures, into flops.txt in the run folder; 0: none."
    )
    profile: NonNegativeInt = Field(
        0,
        description="Step from which torch's profiler records three, into profile/rank_0.json and so on in the run "
        "folder, which ui.perfetto.dev opens; 0: none.",
    )
    norms: NonNegativeInt = Field(
        0,
        description="Steps between records of every layer's gradient norm and of the size of what it gives (rows "
        "'norms'); 0: none.",
    )
    ema: Fraction = Field(0.0, description="Decay of the moving average of the weights; 0 keeps none.")
    log_every: PositiveInt = Field(10, description="Steps between records.")
    report_every: PositiveInt = Field(50, description="Steps between reports on hosts and slow ranks.")
    straggler_ratio: Annotated[float, Field(gt=1)] = Field(
        2.0, description="A rank is reported if its own work takes so many times as long as the median rank's."
    )
    eval_every: NonNegativeInt = Field(200, description="Steps between held-out losses; 0 never.")
    eval_cells: PositiveInt = Field(4096, description="Held-out cells per evaluation, at most.")
    patience: NonNegativeInt = Field(
        0,
        description="Stop after so many evaluations in a row without a new best, and keep the best weights; 0: never.",
    )
    checkpoint_every: PositiveInt = Field(500, description="Steps between checkpoints.")
    checkpoint_async: bool = Field(True, description="Write checkpoints beside training; false: wait for each.")
    keep: Annotated[int, Field(ge=2)] = Field(2, description="Newest checkpoints kept.")
    keep_every: NonNegativeInt = Field(0, description="Also keep checkpoints at multiples of so many steps; 0: none.")
    save_timeout: Annotated[float, Field(gt=0)] = Field(
        3600.0,
        description="Seconds that a checkpoint may take, and what is done after the last step; ranks that wait for it "
        "do not count that as a step.",
    )
    max_failed_saves: PositiveInt = Field(
        5, description="Checkpoints in a row that may fail (no room, no answer of the disk) before the run ends."
    )
    max_skipped: PositiveInt = Field(10, description="Skipped steps in a row before stopping.")
    skip_spikes: NonNegativeFloat = Field(
        0.0, description="Skip steps whose loss is so many (robust) standard deviations above the last 128; 0 never."
    )
    start_timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Seconds for the ranks to meet, and again until the first step is done."
    )
    step_timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Seconds that a step may take; then every rank writes its stacks and the run ends."
    )
    max_restarts: NonNegativeInt = Field(
        3,
        description="Restarts by torchrun in a row without a new checkpoint, after which the run ends; those with one "
        "do not count. `bgen launch` lets torchrun restart more often than that.",
    )
    data_patience: NonNegativeFloat = Field(
        300.0, description="Seconds to go on trying when a batch cannot be read (the file system is away)."
    )
    requeue_exit: Annotated[int, Field(ge=0, le=255)] = Field(
        0,
        description="Exit code of `bgen train` and `finetune` after a signal and a saved checkpoint; a scheduler may "
        "requeue by it.",
    )

    @property
    def cells_at_a_time(self) -> int | None:
        """The micro batch as a number; None: all of a rank's share, and what is not chosen yet (auto)."""
        return self.micro_batch if isinstance(self.micro_batch, int) else None
