"""A trained model with more genes, batches or conditions than it was trained with.

Everything old keeps its weights, so what the model says of old categories and genes does not change. The component that
has new rows decides how they start: a new category starts like "unknown", a new gene at its average share of the
counts, independent of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE


@runtime_checkable
class HasCategories(Protocol):
    """A module with a row for each of its ``categories``."""

    categories: int

    def start_categories(self, known: int) -> None:
        """Let all categories but the first ``known`` start like the unknown."""
        ...


def grow_vae(vae: VAE, covariates: Mapping[str, int], new_shares: Tensor | None = None) -> VAE:
    """Return a VAE with at least as many categories, and with new genes last.

    Parameters
    ----------
    covariates
        Covariate to its number of categories, in the old order.
    new_shares
        ``[new genes]``: counts of each new gene, in units of all counts of the old genes.
    """
    shares = torch.zeros(0) if new_shares is None else new_shares.clamp_min(1e-8)
    grown = VAE(vae.config, vae.n_genes + len(shares), covariates)
    _take_over(vae, grown)
    if len(shares):
        grown.encoder.start_genes(vae.n_genes)
        grown.decoder.start_genes(vae.n_genes, shares)
    return grown.eval()


def grow_flow(flow: LatentFlow, vae: VAE, categories: Mapping[str, int]) -> LatentFlow:
    """Return a flow on a grown VAE, with at least as many categories of each condition, in the old order."""
    numbers = dict.fromkeys(flow.conditions.number_names, (0.0, 1.0))  # the state brings their statistics
    grown = LatentFlow(flow.config, vae, categories, numbers)
    _take_over(flow.conditions, grown.conditions)
    _take_over(flow.backbone, grown.backbone)
    return grown.eval()


def _take_over(old: nn.Module, grown: nn.Module) -> None:
    """Give a larger module the weights of the old one, whose rows stand first."""
    state = {}
    new = grown.state_dict()
    for name, tensor in old.state_dict().items():
        state[name] = new[name].clone()
        state[name][tuple(slice(0, n) for n in tensor.shape)] = tensor
    grown.load_state_dict(state)
    parts = dict(old.named_modules())
    for name, part in grown.named_modules():
        if isinstance(part, HasCategories):
            known = parts[name]
            assert isinstance(known, HasCategories), "the same but for sizes"
            part.start_categories(known.categories)
