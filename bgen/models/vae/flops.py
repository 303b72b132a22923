"""Floating-point operations of the VAE's forward pass; see :mod:`bgen.nn.flops` for what is counted.

Axes: B cells, G genes, D latent size, H hidden width.
"""

from __future__ import annotations

from bgen.config.vae import VAEConfig
from bgen.nn.flops import linear


def vae_flops(config: VAEConfig, n_genes: int, cells: int, nonzeros: int) -> tuple[int, int]:
    """Encoder and decoder over ``cells`` B with ``nonzeros`` stored counts in all.

    The encoder multiplies by the gene weights only where there is a count. The decoder is dense over all genes.
    """
    blocks = config.blocks * 2 * linear(cells, config.hidden, config.hidden)
    encoder = linear(nonzeros, 1, config.hidden) + blocks + linear(cells, config.hidden, 2 * config.latent)
    logits = (2 if config.likelihood == "zinb" else 1) * linear(cells, config.hidden, n_genes)
    return encoder, linear(cells, config.latent, config.hidden) + blocks + logits
