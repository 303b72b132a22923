"""Settings of a fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from bgen.config.flow import FlowConfig
from bgen.config.perturb import PerturbConfig
from bgen.config.run import RunConfig


class FinetuneConfig(RunConfig):
    """The training runs of ``bgen finetune``, on the user's cells in memory.

    The shape of the autoencoder and of the parent's flow comes from the parent and cannot be set.
    """

    stage: Literal["vae", "flow", "perturb"] = Field(
        "vae", description="What a run trains; `bgen finetune` sets it for each of its runs."
    )
    parent: Path = Field(description="Model directory that is fine-tuned.")
    flow: FlowConfig = Field(FlowConfig(), description="A new flow over time, where the parent has none (--task time).")
    perturb: PerturbConfig = Field(
        PerturbConfig(), description="The flow from control to perturbed cells (--task perturb)."
    )

    @model_validator(mode="after")
    def _levels_belong_to_a_store(self) -> FinetuneConfig:
        if self.flow.fit_levels:
            raise ValueError(
                "flow.fit_levels: fine-tuning does not fit levels, `bgen train flow` does; set it to false"
            )
        return self
