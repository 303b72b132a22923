"""A trained model with more genes, batches or conditions than it was trained with.

Everything old keeps its weights, so what the model says of old categories and genes does not change. A new category
starts like "unknown". A new gene starts at its average share of the counts, independent of the state.

Axes: G genes, H width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE


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
    state = grown_state(vae.state_dict(), grown)
    if len(shares):
        old = slice(0, vae.n_genes)
        fresh = slice(vae.n_genes, None)
        with torch.no_grad():
            state["encoder.weight"][fresh] = 0
            state["decoder.logits.weight"][fresh] = 0
            # Over states the logits of a gene vary, so the share is right on average only; training mends the rest.
            typical = state["decoder.logits.bias"][old].logsumexp(0)
            state["decoder.logits.bias"][fresh] = typical + shares.log()
            state["decoder.scaled_log_theta"][fresh] = state["decoder.scaled_log_theta"][old].median()
    grown.load_state_dict(state)
    return grown.eval()


def grow_flow(flow: LatentFlow, vae: VAE, categories: Mapping[str, int]) -> LatentFlow:
    """Return a flow on a grown VAE, with at least as many categories of each condition, in the old order."""
    numbers = dict.fromkeys(flow.conditions.number_names, (0.0, 1.0))  # the state brings their statistics
    grown = LatentFlow(flow.config, vae, categories, numbers)
    old = {name: tensor for name, tensor in flow.state_dict().items() if not name.startswith("vae.")}
    grown.load_state_dict({**grown_state(old, grown), **{f"vae.{k}": v for k, v in vae.state_dict().items()}})
    return grown.eval()


def grown_state(old: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a larger module: the old rows first, and new rows of an embedding like its "unknown" row."""
    state = {}
    new = module.state_dict()
    for name, tensor in old.items():
        target = new[name].clone()
        target[tuple(slice(0, n) for n in tensor.shape)] = tensor
        if name.endswith("table.weight"):
            target[len(tensor) :] = tensor[0]
        state[name] = target
    return state
