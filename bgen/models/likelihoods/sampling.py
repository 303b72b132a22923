"""Negative-binomial counts from keyed uniform numbers, by exact inversion: the same key gives the same counts.

Axes: B cells, G genes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgen.nn.random import Stream, uniform64

_SEARCHED = 200
"""Distributions with means up to this are inverted by searching upwards from zero; others by scipy on the CPU (few
entries, slow).
"""


_LARGEST = 2**31 - 1
"""Counts are int32."""


def sample_negative_binomial(mu: Tensor, theta: Tensor, keys: Tensor) -> Tensor:
    """Draw int32 ``[B, G]`` with means ``mu [B, G]`` and inverse dispersions ``theta [G]``, keyed by ``keys [B]``.

    The walk is in float64, which Apple's GPUs lack: what is there is drawn on the CPU.
    """
    if mu.device.type == "mps":
        return sample_negative_binomial(mu.cpu(), theta.cpu(), keys.cpu()).to(mu.device)
    return negative_binomial_quantile(uniform64(keys, Stream.COUNTS, mu.shape[1]), mu, theta)


def negative_binomial_quantile(uniforms: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Return int32 ``[B, G]``: quantiles at float64 ``uniforms [B, G]`` in (0, 1); ``theta [G]`` or ``[B, G]``.

    ``x`` is the smallest integer with F(x) >= u. Most entries are zero and leave after one comparison; the others walk
    up the distribution, ``p(x + 1) = p(x) * (x + theta) / (x + 1) * mu / (mu + theta)``, in float64.
    """
    mu, theta = mu.double(), theta.double().expand_as(mu)
    probability = torch.exp(-theta * torch.log1p(mu / theta))
    counts = torch.zeros(mu.shape, dtype=torch.int32, device=mu.device).view(-1)

    large = mu > _SEARCHED
    if large.any():
        from scipy import stats  # takes most of a second to import, in every process that trains

        mean, size, quantile = (values[large].cpu().numpy() for values in (mu, theta, uniforms))
        drawn = torch.from_numpy(stats.nbinom.ppf(quantile, size, size / (size + mean))).clamp_(max=_LARGEST)
        counts[large.view(-1)] = drawn.to(counts)

    entry = ((uniforms > probability) & ~large).view(-1).nonzero().squeeze(1)
    u, p, t = (values.reshape(-1)[entry] for values in (uniforms, probability, theta))
    m = mu.reshape(-1)[entry]
    step = m / (m + t)
    cumulative = p.clone()
    x = 0
    while len(entry):
        p = p * ((x + t) / (x + 1) * step)
        x += 1
        cumulative = cumulative + p
        # The second test ends the walk where rounding keeps F just below a u next to 1.
        done = (u <= cumulative) | ((p < 1e-18) & (cumulative > 0.5))
        counts[entry[done]] = x
        keep = ~done
        entry, u, p, t, step, cumulative = (values[keep] for values in (entry, u, p, t, step, cumulative))
    return counts.view(mu.shape)
