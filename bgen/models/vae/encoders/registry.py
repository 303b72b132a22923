"""The encoders by name. README.md in this folder says how to add one."""

from __future__ import annotations

from collections.abc import Mapping

from bgen.config.vae import VAEConfig
from bgen.models.vae.encoders.encoder import Encoder
from bgen.models.vae.encoders.gene_set import GeneSetEncoder
from bgen.models.vae.encoders.ranked import RankedEncoder
from bgen.models.vae.encoders.state_vector import StateVectorEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "state_vector": StateVectorEncoder,
    "gene_set": GeneSetEncoder,
    "ranked": RankedEncoder,
}
"""Their settings are in :data:`bgen.config.vae.ENCODERS`."""


def build_encoder(config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> Encoder:
    """Make the encoder that ``config.encoder`` names."""
    return ENCODERS[config.encoder.name](config, n_genes, covariates)
