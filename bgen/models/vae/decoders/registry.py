"""The decoders by name. README.md in this folder says how to add one."""

from __future__ import annotations

from collections.abc import Mapping

from bgen.config.vae import VAEConfig
from bgen.models.vae.decoders.decoder import Decoder
from bgen.models.vae.decoders.gene_table import GeneTableDecoder
from bgen.models.vae.decoders.state_vector import StateVectorDecoder

DECODERS: dict[str, type[Decoder]] = {"state_vector": StateVectorDecoder, "gene_table": GeneTableDecoder}
"""Their settings are in :data:`bgen.config.vae.DECODERS`."""


def build_decoder(config: VAEConfig, n_genes: int, covariates: Mapping[str, int]) -> Decoder:
    """Make the decoder that ``config.decoder`` names."""
    return DECODERS[config.decoder.name](config, n_genes, covariates)
