"""Settings of the flow from control to perturbed cells."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bgen.config.section import Fraction, NonNegativeInt, PositiveInt, Section


class PerturbConfig(Section):
    """The flow from control to perturbed cells (:mod:`bgen.models.generators.perturbation_flow`)."""

    width: PositiveInt = Field(64, description="Width of the embeddings and of the network.")
    blocks: NonNegativeInt = Field(2, description="Residual blocks of the network.")
    gene_components: PositiveInt = Field(16, description="Size of the genes' co-expression rows.")
    combine: Literal["additive", "joint"] = Field(
        "additive", description="A set acts as the sum of its members, or as one network of their summed embeddings."
    )
    coupling: Literal["ot", "independent"] = Field(
        "ot", description="Control and perturbed cells of a stratum are paired by optimal transport, or at random."
    )
    forget: Fraction = Field(0.2, description="Share of pairs whose target is treated as unseen in training.")
    scale: bool = Field(True, description="Calibrate the size of average effects on held-back training cells.")
