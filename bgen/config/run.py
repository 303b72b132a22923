"""Every setting of bgen, typed, defined once, with its meaning and unit.

A configuration is read by :func:`bgen.config.load.load_config` from YAML files and ``a.b=c`` overrides. Constructors
take the section that concerns them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bgen.config.data import DataConfig
from bgen.config.flow import FlowConfig, SampleConfig
from bgen.config.section import Section
from bgen.config.track import TrackConfig
from bgen.config.train import TrainConfig
from bgen.config.vae import VAEConfig
from bgen.errors import MOST_SEEDS
from bgen.files import require_local


class RunConfig(Section):
    """What every training run has, wherever its cells come from."""

    stage: Literal["vae", "flow"] = Field(description="What is trained.")
    out: Path = Field(description="Run folder: checkpoints, record, resolved configuration.")
    seed: Annotated[int, Field(ge=0, le=MOST_SEEDS)] = 0
    train: TrainConfig = TrainConfig()
    track: TrackConfig = TrackConfig()

    @field_validator("out")
    @classmethod
    def _is_local(cls, out: Path) -> Path:
        require_local(out)
        return out


class Config(RunConfig):
    """A training run of ``bgen train``, on cells from a store."""

    data: DataConfig
    vae: VAEConfig = VAEConfig()
    flow: FlowConfig = FlowConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _flow_needs_a_vae(self) -> Config:
        if self.stage == "flow" and self.flow.space == "latent" and self.flow.vae is None:
            raise ValueError(
                "flow.vae: stage 'flow' needs the run folder or exported directory of a trained VAE (or, without one, "
                "flow.space=log_counts)"
            )
        return self

    @model_validator(mode="after")
    def _populations_are_there(self) -> Config:
        trajectories, flow = self.data.trajectories, self.flow
        if flow.mixing.share > 0 and (trajectories is None or trajectories.along != "perturbation"):
            raise ValueError("flow.mixing.share: only trajectories along a perturbation are mixed; set it to 0")
        if flow.endpoint > 0 and trajectories is None:
            raise ValueError("flow.endpoint: single cells are no populations; set it to 0, or train on trajectories")
        if flow.coupling.cells > 0 and trajectories is None:
            raise ValueError("flow.coupling.cells: single cells have no neighbours to start from; set it to 0")
        if flow.coupling.growth and trajectories is not None and trajectories.along == "perturbation":
            raise ValueError("flow.coupling.growth: grows along time, not along a perturbation; set it to false")
        return self

    @model_validator(mode="after")
    def _batches_hold_whole_trajectories(self) -> Config:
        trajectories = self.data.trajectories
        if trajectories is None:
            return self
        if self.stage == "vae":
            raise ValueError("data.trajectories: the VAE learns from single cells; set it for stage flow only")
        if self.flow.fit_levels:
            raise ValueError(
                "flow.fit_levels: levels are fitted to cells that are generated one by one, which a flow that learns "
                "data.trajectories does not generate; set it to false"
            )
        for name, cells in (
            ("train.global_batch", self.train.global_batch),
            ("train.micro_batch", self.train.cells_at_a_time),
        ):
            if cells is not None and cells % trajectories.size:
                nearest = max(1, round(cells / trajectories.size)) * trajectories.size
                raise ValueError(
                    f"{name}: {cells} cells are no whole number of trajectories of data.trajectories.times x cells = "
                    f"{trajectories.size}; nearest that is: {nearest}"
                )
        return self
