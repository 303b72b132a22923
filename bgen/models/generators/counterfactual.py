"""A measured cell under other expectations: its own counts, thinned where a gene falls and increased where it rises.

The cells of a model differ from real ones in what it does not know: how genes vary together within a state, and
averages of logarithms. Where only a change is to be predicted, the measured cell can supply all of that. With x ~
NB(mu, theta), which is Poisson with a rate lambda ~ Gamma, and expectations that change by a factor f,

    f < 1:  x' ~ Binomial(x, f)
    f > 1:  x' = x + Poisson((f - 1) lambda),  lambda | x ~ Gamma(theta + x) / (theta / mu + 1)

are both NB(f mu, theta) over cells, while each cell stays as close to its own counts as possible; without change x' =
x. The uniform numbers behind the draws of a gene are spread evenly over the cells of equal count: with few control
cells, the noise of independent numbers would hide small effects.

Axes: B cells, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bgen.models.codec import Codec
from bgen.models.likelihoods.negative_binomial import NegativeBinomial
from bgen.models.likelihoods.sampling import negative_binomial_quantile
from bgen.models.vae.thinning import binomial
from bgen.nn.random import Stream, uniform64

_GOLDEN = (5**0.5 - 1) / 2
"""Any run of its multiples, modulo 1, is spread evenly over (0, 1)."""

_LEAST_KEPT = 1e-6
"""Factors below this are taken as 0."""


@torch.no_grad()
def change_counts(counts: Tensor, before: NegativeBinomial, after: NegativeBinomial, keys: Tensor) -> Tensor:
    """Return counts float32 ``[B, G]`` of cells with ``counts`` of that shape, keyed by ``keys [B]``.

    ``before`` and ``after`` are the model's distributions of the cells as they are and as they become; the result is
    where they are; on the CPU if that is one of Apple's GPUs, which lack float64.
    """
    if before.logits.device.type == "mps":
        before, after = (
            NegativeBinomial(of.logits.cpu(), of.library.cpu(), of.log_theta.cpu()) for of in (before, after)
        )
    counts, keys = counts.to(before.logits.device), keys.to(before.logits.device)
    fold = (after.rate / before.rate).nan_to_num(1.0)
    falls, rises = (counts > 0) & (fold < 1), fold > 1
    u = _spread(keys, counts)
    lost = binomial(counts[falls], 1 - fold[falls].clamp_min(_LEAST_KEPT), u[falls].float())
    theta = before.log_theta.exp()
    rate = (theta + counts) / (theta / before.rate + 1)
    added = negative_binomial_quantile(u.where(rises, 0.5), (fold - 1).clamp_min(0) * rate, theta + counts)
    return (counts + added).masked_scatter(falls, counts[falls] - lost)


def _spread(keys: Tensor, counts: Tensor) -> Tensor:
    """Uniform float64 ``[B, G]``, of each gene spread evenly over (0, 1) among cells of the same count."""
    B, G = counts.shape
    within, order = uniform64(keys, Stream.COUNTS, 2 * G).chunk(2, dim=1)
    first = (uniform64(keys[:1], Stream.COUNTS, 3 * G)[:, 2 * G :] * B).long()
    turned = (torch.arange(B, device=counts.device, dtype=torch.float64) * _GOLDEN).frac()
    place = turned.argsort().argsort()[(counts + order).argsort(0).argsort(0)]
    return ((place + first) % B + within) / B


@torch.no_grad()
def mean_share(codec: Codec, latents: Tensor, covariates: Mapping[str, Tensor]) -> Tensor:
    """``[G]``: mean over cells of the decoder's expected shares, for whitened latents ``[B, D + 1]``.

    What is given may lie on the CPU; the result is where the codec is.
    """
    z, _ = codec.unwhiten(latents.to(codec.device))
    return codec.decode(z, torch.ones(len(z), device=z.device), _there(covariates, codec)).mean.mean(0)


@torch.no_grad()
def decode_changed(codec: Codec, latents: Tensor, folds: Tensor, covariates: Mapping[str, Tensor]) -> NegativeBinomial:
    """Return the distribution of counts for whitened latents ``[B, D + 1]``, with log fold changes ``[G]`` on top.

    Since these are ratios of shares, the share that falling genes lose goes to all genes in proportion. What is given
    may lie on the CPU; the result is where the codec is.
    """
    z, log_library = codec.unwhiten(latents.to(codec.device))
    decoded = codec.decode(z, log_library.exp(), _there(covariates, codec))
    return NegativeBinomial(decoded.logits + folds.to(codec.device), log_library.exp(), decoded.log_theta)


def _there(covariates: Mapping[str, Tensor], codec: Codec) -> dict[str, Tensor]:
    return {name: codes.to(codec.device) for name, codes in covariates.items()}
