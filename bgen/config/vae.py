"""Settings of the VAE of counts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bgen.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class VAEConfig(Section):
    """The variational autoencoder of counts (bgen/README.md, "VAE" and "Likelihoods")."""

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
