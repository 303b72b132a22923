"""Where the path of a time point starts, at t = 1: noise, or what its observed neighbours say of it.

    between two observed time points    their displacement interpolation at that time (the OT-midpoint)
    after the last, before the first    the cells of the nearest observed time point
    nothing observed                    standard normal noise

From such a start the velocity only has to learn what straight lines at constant speed miss: a network that predicts
zero reproduces the baseline. Data and start are paired at least cost within each population, so that paths are short
and do not cross. The three kinds of start ask for three different things: an acceleration, a way ahead, and whole
cells. So a network has an output for each. (A single output would confuse the large displacements of forecasts with the
small accelerations of interpolations.)

Axes: B trajectories, T time points, N cells per time point, D latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bgen.flow.displacement import displace, draw, pair

KINDS = NOISE, BETWEEN, BESIDE = 0, 1, 2
"""Where a time point starts: noise, between two observed ones, beside the nearest observed one."""


@dataclass(frozen=True)
class Starts:
    """What the output of a network means at each time point.

    Attributes
    ----------
    kind
        int64 ``[B, T]``: one of :data:`KINDS`.
    reach
        ``[B, T]``: what the output is multiplied by.
    """

    kind: Tensor
    reach: Tensor

    def velocity(self, outputs: Tensor) -> Tensor:
        """Choose from ``outputs [B, T, N, len(KINDS) D]`` by the kind of start, and scale: ``[B, T, N, D]``."""
        of_kind = outputs.unflatten(-1, (len(KINDS), -1))
        chosen = self.kind[..., None, None, None].expand(*of_kind.shape[:3], 1, of_kind.shape[-1])
        return of_kind.gather(3, chosen).squeeze(3) * self.reach[..., None, None]


def neighbours(exists: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each time point the observed ones before and after it: int64 ``[B, T]`` each, -1 where none is.

    ``exists`` and ``observed`` are bool ``[B, T]``.
    """
    T = exists.shape[1]
    place = torch.arange(T, device=exists.device).expand(exists.shape)
    known = exists & observed
    before = torch.where(known, place, -1).cummax(1).values
    after = torch.where(known, place, T).flip(1).cummin(1).values.flip(1)
    before = torch.cat([torch.full_like(before[:, :1], -1), before[:, :-1]], 1)
    after = torch.cat([after[:, 1:], torch.full_like(after[:, :1], T)], 1)
    return before, torch.where(after == T, -1, after)


@torch.no_grad()
def start(z: Tensor, mask: Tensor, time: Tensor, observed: Tensor, noise: Tensor, seeds: Tensor) -> Tensor:
    """Return ``z_1 [B, T, N, D]``.

    Parameters
    ----------
    z
        ``[B, T, N, D]``: data where observed; anything elsewhere.
    mask, time, observed
        ``[B, T, N]``: cells that exist; ``[B, T]``: when the time points are; ``[B, T]``: which are given.
    noise
        ``[B, T, N, D]``: what time points without an observed neighbour start from.
    seeds
        int64 ``[B, T]``: the draw from the plan is a pure function of them.

    Plans are solved on the CPU, whatever the device: everything goes there once, and comes back once.
    """
    device = z.device
    z, mask, time, observed, seeds = (t.cpu() for t in (z, mask, time, observed, seeds))
    exists = mask.any(-1)
    before, after = neighbours(exists, observed)
    z1 = noise.to("cpu", copy=True)
    for b, t in (exists & ~observed & ((before >= 0) | (after >= 0))).nonzero().tolist():
        low, high = int(before[b, t]), int(after[b, t])
        wanted = int(mask[b, t].sum())
        rng = np.random.default_rng(int(seeds[b, t]) & (2**63 - 1))
        sides = [z[b, k][mask[b, k]].numpy() for k in (low, high) if k >= 0]
        if len(sides) == 2:
            share = float((time[b, t] - time[b, low]) / (time[b, high] - time[b, low]).clamp_min(1e-12))
            points, weights = displace(sides[0], sides[1], share)
        else:
            points = rng.permutation(sides[0]).astype(np.float64)
            weights = np.full(len(points), 1 / len(points))
        chosen = points[draw(weights, wanted, rng)]
        z1[b, t, mask[b, t]] = torch.from_numpy(chosen).to(z1)
    return z1.to(device)


@torch.no_grad()
def couple(z0: Tensor, z1: Tensor, mask: Tensor, moving: Tensor) -> Tensor:
    """Return ``z_1`` with the cells of the time points ``moving [B, T]`` in the order of their partners in ``z_0``."""
    paired, device = z1.to("cpu", copy=True), z1.device
    z0, z1, mask, moving = (t.cpu() for t in (z0, z1, mask, moving))
    for b, t in (mask.any(-1) & moving).nonzero().tolist():
        there = mask[b, t]
        x0, x1 = z0[b, t][there], z1[b, t][there]
        paired[b, t, there] = x1[torch.from_numpy(pair(x0.numpy(), x1.numpy()))]
    return paired.to(device)


def starts_of(time: Tensor, exists: Tensor, observed: Tensor, scale: float) -> Starts:
    """Return the kind of start and the reach of each time point; all arguments but ``scale`` are ``[B, T]``.

    between observed neighbours at times a and b
        ``(t - a) (b - t) / scale^2``. To second order, a straight line misses this times half the acceleration of a
        smooth path. So the acceleration learnt over one gap holds for another gap.
    beside the nearest observed one, at time a
        ``1 - exp(-(t - a) / scale)``, and its negative before a: the share of the way ahead that cells have gone if
        they come to rest. For short gaps this is the gap itself, so the output acts as a velocity.
    noise
        1.
    """
    before, after = neighbours(exists, observed)
    since, until = (time - time.gather(1, k.clamp_min(0)) for k in (before, after))
    inner = (before >= 0) & (after >= 0)
    kind = torch.where(inner, BETWEEN, torch.where((before >= 0) | (after >= 0), BESIDE, NOISE))
    ahead = torch.where(before >= 0, since, until) / scale
    beside = -ahead.sign() * torch.expm1(-ahead.abs())
    reach = torch.where(kind == BETWEEN, -since * until / scale**2, torch.where(kind == BESIDE, beside, 1.0))
    return Starts(kind, reach)
