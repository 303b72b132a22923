"""Every setting of bgen, typed, defined once, with its meaning and unit.

A configuration is read by :func:`bgen.config.load.load_config` from YAML files and ``a.b=c`` overrides. Constructors
take the section that concerns them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bgen.config.backbone import BackboneConfig
from bgen.config.data import DataConfig as DataConfig
from bgen.config.data import TrajectoriesConfig as TrajectoriesConfig
from bgen.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class VAEConfig(Section):
    """The variational autoencoder of counts (DESIGN, section 9)."""

    latent: PositiveInt = Field(16, description="Size of the latent, D.")
    hidden: PositiveInt = Field(256, description="Width of the encoder's and decoder's hidden layers.")
    blocks: NonNegativeInt = Field(2, description="Residual blocks in the encoder, and as many in the decoder.")
    dropout: Fraction = Field(0.1, description="Dropout in the residual blocks.")
    likelihood: Literal["nb", "zinb"] = Field("nb", description="Negative binomial, or its zero-inflated form.")
    covariates: list[str] = Field(
        default_factory=list, description="obs columns (roles or names) given to encoder and decoder, such as batch."
    )
    kl_weight: NonNegativeFloat = Field(1.0, description="Weight of the KL term after warm-up.")
    kl_warmup: NonNegativeInt = Field(400, description="Steps over which the KL weight rises from 0.")
    free_bits: NonNegativeFloat = Field(0.0, description="KL per latent dimension, in nats, that is not penalised.")
    thinning: Fraction = Field(
        0.5,
        description="Share of cells thinned for the encoder; the kept fraction is uniform in (0.3, 1).",
    )
    recompute: bool = Field(False, description="Activation checkpointing of the residual blocks: less memory, slower.")
    transfer_from: PositiveInt | None = Field(
        None,
        description="Hidden width at which the learning rate was found; starts and rates then follow muP. null: the "
        "same learning rate for everything.",
    )


class PatternsConfig(Section):
    """How often training on trajectories observes which time points (DESIGN, section 4).

    An observed time point is held at flow time t = 0 and does not enter the loss. The weights need not add up to 1; a
    pattern that a trajectory is too short for, or has no control for, is left out for it.
    """

    noise: NonNegativeFloat = Field(1.0, description="Weight of observing nothing: joint generation.")
    forecast: NonNegativeFloat = Field(1.0, description="Weight of observing the past, up to a time point drawn.")
    interpolate: NonNegativeFloat = Field(1.0, description="Weight of observing all but one time point in between.")
    perturb: NonNegativeFloat = Field(1.0, description="Weight of observing the control populations.")
    independent: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Share of trajectories whose time points have flow times of their own; others share one."
    )

    @model_validator(mode="after")
    def _some_pattern(self) -> PatternsConfig:
        if not self.noise + self.forecast + self.interpolate + self.perturb > 0:
            raise ValueError("at least one of noise, forecast, interpolate and perturb must be above 0")
        return self


class FlowConfig(Section):
    """The rectified flow in the latent space (DESIGN, section 4)."""

    vae: Path | None = Field(None, description="Run folder or exported directory of the VAE; needed by stage flow.")
    backbone: BackboneConfig = BackboneConfig()
    conditions: list[str] = Field(
        default_factory=list, description="obs columns (roles or names) that generation can be asked for."
    )
    condition_dropout: Fraction = Field(0.15, description="Probability that training hides a cell's conditions.")
    t_sampling: Literal["uniform", "stratified", "logit_normal"] = Field(
        "stratified", description="Distribution of the flow time t in training."
    )
    patterns: PatternsConfig = PatternsConfig()
    source: Literal["noise", "neighbours"] = Field(
        "noise",
        description="What flows into data. neighbours: on trajectories, time points with an observed neighbour start "
        "from it, or from the displacement interpolation of both (see bgen/flow/start.py); all others from noise. The "
        "network has an output for each.",
    )
    prediction: Literal["velocity", "data"] = Field("velocity", description="What the network's output means.")

    @model_validator(mode="after")
    def _velocity_from_neighbours(self) -> FlowConfig:
        if self.source == "neighbours" and self.prediction == "data":
            raise ValueError("source: neighbours learns velocities; leave prediction at velocity")
        return self


class PerturbConfig(Section):
    """The flow from control to perturbed cells, and the fold changes of genes
    (:mod:`bgen.models.generators.perturbation_flow`).
    """

    width: PositiveInt = Field(64, description="Width of the embeddings and of the network.")
    blocks: NonNegativeInt = Field(2, description="Residual blocks of the network.")
    gene_components: PositiveInt = Field(16, description="Size of the genes' co-expression rows.")
    combine: Literal["additive", "joint"] = Field(
        "additive", description="A set acts as the sum of its members, or as the network of their summed embeddings."
    )
    coupling: Literal["ot", "independent"] = Field(
        "ot", description="Control and perturbed cells of a stratum are paired by optimal transport, or at random."
    )
    forget: Fraction = Field(0.2, description="Share of pairs whose target is treated as unseen in training.")
    scale: bool = Field(True, description="Multiply average effects by what held-back training cells say.")


class SampleConfig(Section):
    """Defaults of generation; `bgen generate` can override each."""

    solver: Literal["euler", "heun", "midpoint", "adaptive"] = Field(
        "heun", description="ODE solver; adaptive (Dormand-Prince) chooses its own steps by the tolerance."
    )
    steps: PositiveInt = Field(20, description="Solver steps from t = 1 (noise) to t = 0 (data); adaptive has its own.")
    tolerance: PositiveFloat = Field(1e-3, description="Relative and absolute error that solver adaptive allows.")
    noise: PositiveFloat = Field(
        1.0,
        description="Standard deviation of the noise that generation starts from: above 1 covers more of what real "
        "cells are, with more cells further out than those; below 1 the reverse.",
    )
    guidance: NonNegativeFloat = Field(1.0, description="Guidance scale; 1 is the conditional model itself.")
    guidance_interval: tuple[float, float] = Field((0.0, 1.0), description="Range of t in which guidance acts.")

    @model_validator(mode="after")
    def _interval_within_time(self) -> SampleConfig:
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: from {low:g} to {high:g} is no range within 0 to 1")
        return self


class OffloadConfig(Section):
    """What leaves the accelerator's memory between uses."""

    optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the optimiser's state and the float32 weights live; cpu needs zero 1 to 3, nvme 3."
    )
    parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the parameters live between uses; needs zero 3."
    )
    folder: Path | None = Field(None, description="Folder on a local NVMe disk, on every host; needed by nvme.")


class TrainConfig(Section):
    """The training loop and its DeepSpeed engine (DESIGN, section 10)."""

    steps: PositiveInt = Field(2000, description="Optimiser steps.")
    global_batch: PositiveInt = Field(512, description="Cells per optimiser step over all ranks.")
    micro_batch: PositiveInt | None = Field(
        None, description="Cells per forward pass on one rank; default: all of the rank's share."
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
    deepspeed: Path | None = Field(
        None, description="JSON file with further DeepSpeed settings, merged over those that follow from this section."
    )
    comms_log: bool = Field(False, description="Count DeepSpeed's collectives; summary in the record at the end.")
    flops_profile: NonNegativeInt = Field(
        0, description="Step that DeepSpeed's FLOPs profiler looks at, into flops.txt in the run folder; 0 none."
    )
    ema: Fraction = Field(0.0, description="Decay of the moving average of the weights; 0 keeps none.")
    log_every: PositiveInt = Field(10, description="Steps between records.")
    report_every: PositiveInt = Field(50, description="Steps between reports on hosts and slow ranks.")
    straggler_ratio: Annotated[float, Field(gt=1)] = Field(
        2.0, description="A rank is reported if it takes so many times the median rank's time for its own work."
    )
    eval_every: NonNegativeInt = Field(200, description="Steps between held-out losses; 0 never.")
    eval_cells: PositiveInt = Field(4096, description="Held-out cells per evaluation, at most.")
    patience: NonNegativeInt = Field(
        0,
        description="Stop after so many evaluations without a better one, keep the best weights; 0 never.",
    )
    checkpoint_every: PositiveInt = Field(500, description="Steps between checkpoints.")
    checkpoint_async: bool = Field(True, description="Write checkpoints beside the training; false: wait for each.")
    keep: Annotated[int, Field(ge=2)] = Field(2, description="Newest checkpoints kept.")
    keep_every: NonNegativeInt = Field(0, description="Also keep those at multiples of so many steps; 0 none.")
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
    data_patience: NonNegativeFloat = Field(
        300.0, description="Seconds to go on trying when a batch cannot be read (the file system is away)."
    )
    requeue_exit: Annotated[int, Field(ge=0, le=255)] = Field(
        0,
        description="Exit code of `bgen train` and `finetune` after a signal and a saved checkpoint; a scheduler may "
        "requeue by it.",
    )


class TrackConfig(Section):
    """Where metrics go. The JSONL record in the run folder is always written; MLflow mirrors it."""

    mlflow: bool = Field(True, description="Mirror the record to MLflow.")
    uri: str | None = Field(None, description="Default: MLFLOW_TRACKING_URI, else sqlite beside the run folder.")
    experiment: str = "bgen"
    run_name: str | None = Field(None, description="Default: the run folder's name.")
    progress: bool = Field(True, description="Show a progress bar on rank 0.")
    checkpoints: bool = Field(False, description="Send each checkpoint to MLflow too, as an artifact of the run.")
    system: bool = Field(True, description="Record each host's CPU, memory, disk, network and GPU use.")


class Config(Section):
    """One training run."""

    stage: Literal["vae", "flow", "perturb"] = Field(description="perturb: by `bgen finetune --task perturb` only.")
    out: Path = Field(description="Run folder: checkpoints, record, resolved configuration.")
    seed: NonNegativeInt = 0
    data: DataConfig
    vae: VAEConfig = VAEConfig()
    flow: FlowConfig = FlowConfig()
    perturb: PerturbConfig = PerturbConfig()
    sample: SampleConfig = SampleConfig()
    train: TrainConfig = TrainConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _flow_needs_a_vae(self) -> Config:
        if self.stage == "flow" and self.flow.vae is None:
            raise ValueError("flow.vae: stage 'flow' needs the run folder or exported directory of a trained VAE")
        return self

    @model_validator(mode="after")
    def _batches_hold_whole_trajectories(self) -> Config:
        trajectories = self.data.trajectories
        if trajectories is None:
            return self
        if self.stage == "vae":
            raise ValueError("data.trajectories: the VAE learns from single cells; set it for stage flow only")
        for name, cells in (
            ("train.global_batch", self.train.global_batch),
            ("train.micro_batch", self.train.micro_batch),
        ):
            if cells is not None and cells % trajectories.size:
                nearest = max(1, round(cells / trajectories.size)) * trajectories.size
                raise ValueError(
                    f"{name}: {cells} cells are no whole number of trajectories of data.trajectories.times x cells = "
                    f"{trajectories.size}; nearest that is: {nearest}"
                )
        return self
