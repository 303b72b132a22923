"""Settings of a fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from bgen.config.flow import FlowConfig, LogCountsConfig
from bgen.config.run import RunConfig


class FinetuneConfig(RunConfig):
    """The training runs of ``bgen finetune``, on the user's cells in memory.

    The shape of the autoencoder, the space and the shape of the parent's flow come from the parent and cannot be set.
    """

    stage: Literal["vae", "flow"] = Field(
        "vae", description="What a run trains; `bgen finetune` sets it for each of its runs."
    )
    parent: Path = Field(description="Model directory that is fine-tuned.")
    flow: FlowConfig = Field(
        FlowConfig(), description="A new flow, where the parent has none over time or along perturbations."
    )

    @model_validator(mode="after")
    def _space_is_the_parents(self) -> FinetuneConfig:
        if self.flow.space != "latent" or self.flow.log_counts != LogCountsConfig():
            raise ValueError("flow.space: the space of a flow is that of the parent; leave space and log_counts out")
        return self

    @model_validator(mode="after")
    def _levels_belong_to_a_store(self) -> FinetuneConfig:
        if self.flow.fit_levels:
            raise ValueError(
                "flow.fit_levels: fine-tuning does not fit levels, `bgen train flow` does; set it to false"
            )
        return self
