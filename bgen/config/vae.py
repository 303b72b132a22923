"""Settings of the VAE of counts.

An encoder's or decoder's own settings are a section here and one line in :data:`ENCODERS` or :data:`DECODERS`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from bgen.config.components import ChosenByName, NamedSection
from bgen.config.gene_set import GeneSetEncoderConfig, GeneTableDecoderConfig, RankedEncoderConfig
from bgen.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class StateVectorEncoderConfig(NamedSection):
    """Log-normalised counts of all genes through an MLP; its sizes are the VAE's ``hidden`` and ``blocks``."""

    name: Literal["state_vector"] = "state_vector"


class StateVectorDecoderConfig(NamedSection):
    """An MLP to all genes at once; its sizes are the VAE's ``hidden`` and ``blocks``."""

    name: Literal["state_vector"] = "state_vector"


ENCODERS: dict[str, type[NamedSection]] = {
    "state_vector": StateVectorEncoderConfig,
    "gene_set": GeneSetEncoderConfig,
    "ranked": RankedEncoderConfig,
}
"""Encoders to their settings; the encoders themselves are in :mod:`bgen.models.vae.encoders.registry`."""

DECODERS: dict[str, type[NamedSection]] = {
    "state_vector": StateVectorDecoderConfig,
    "gene_table": GeneTableDecoderConfig,
}
"""Decoders, likewise (:mod:`bgen.models.vae.decoders.registry`)."""


class PanelConfig(Section):
    """Cells that are shown to the encoder as if fewer genes had been measured, while the decoder explains all."""

    share: Fraction = Field(0.0, description="Share of cells that are shown so in training; 0: none.")
    most: Fraction = Field(0.9, description="Share of its genes that such a cell loses: uniform up to this.")


class VAEConfig(Section):
    """The variational autoencoder of counts (bgen/README.md, "VAE" and "Likelihoods")."""

    encoder: Annotated[SerializeAsAny[NamedSection], ChosenByName(ENCODERS, "state_vector")] = Field(
        StateVectorEncoderConfig(), description="From counts to the latent state: name, and that encoder's settings."
    )
    decoder: Annotated[SerializeAsAny[NamedSection], ChosenByName(DECODERS, "state_vector")] = Field(
        StateVectorDecoderConfig(), description="From the latent state to counts: name, and that decoder's settings."
    )

    latent: PositiveInt = Field(16, description="Size of the latent, D.")
    latent_tokens: PositiveInt = Field(
        1,
        description="Tokens, K, that the latent state consists of, each read off as many of the encoder's tokens: for "
        "flow.backbone.pattern with tokens, whose count is then the same. Encoder gene_set only.",
    )
    hidden: PositiveInt = Field(256, description="Width of the encoder's and decoder's hidden layers.")
    blocks: NonNegativeInt = Field(2, description="Residual blocks in the encoder, and as many in the decoder.")
    dropout: Fraction = Field(0.1, description="Dropout in the residual blocks.")
    likelihood: Literal["nb", "zinb"] = Field("nb", description="Negative binomial, or its zero-inflated form.")
    covariates: list[str] = Field(
        default_factory=list, description="obs columns (roles or names) given to encoder and decoder, such as batch."
    )
    kl_weight: NonNegativeFloat = Field(
        0.1,
        description="Weight of the KL term after warm-up. The flow learns latents of any shape, and a stronger pull "
        "towards N(0, I) loses what tells cells apart.",
    )
    kl_warmup: NonNegativeInt = Field(100, description="Steps over which the KL weight rises from 0.")
    free_bits: NonNegativeFloat = Field(0.0, description="KL per latent dimension, in nats, that is not penalised.")
    thinning: Fraction = Field(
        0.5,
        description="Share of cells thinned for the encoder; the kept fraction is uniform in (0.3, 1).",
    )
    panel: PanelConfig = PanelConfig()
    fit_levels: bool = Field(
        False,
        description="After training, move each gene's logit to where the likelihood of training cells is highest.",
    )
    recompute: bool = Field(False, description="Activation checkpointing of the residual blocks: less memory, slower.")
    transfer_from: PositiveInt | None = Field(
        None,
        description="Hidden width at which the learning rate was found; starts and rates then follow muP. null: the "
        "same learning rate for everything.",
    )

    @model_validator(mode="after")
    def _has_tokens(self) -> Self:
        if self.latent_tokens == 1:
            return self
        own = self.encoder
        if not isinstance(own, GeneSetEncoderConfig):
            raise ValueError(f"latent_tokens: encoder {own.name} has no tokens; set encoder.name=gene_set, or 1")
        read = own.tokens + sum(part.tokens for part in (own.groups, own.network) if part is not None)
        for what, number in (("latent size", self.latent), ("tokens of the encoder", read)):
            if number % self.latent_tokens:
                raise ValueError(f"latent_tokens: {self.latent_tokens} does not divide the {what}, {number}")
        return self

    def exported(self) -> Self:
        """Return the settings as a model directory has them."""
        return self.model_copy(update={"encoder": self.encoder.exported(), "decoder": self.decoder.exported()})
