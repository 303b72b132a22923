"""Which time points are observed: held at t = 0 while the others flow ("diffusion forcing").

    noise         none: everything is generated together
    forecast      the first k
    interpolate   all but one in between
    perturb       the control populations

(Diffusion forcing, flow times that differ along a sequence: Chen et al., arXiv 2407.01392.)

Axes: B trajectories, T time points, P patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgen.nn.gpu.draws import uniform
from bgen.nn.random import Stream

PATTERNS = ("noise", "forecast", "interpolate", "perturb")


def forecast(exists: Tensor, known: Tensor | int) -> Tensor:
    """Observe the first ``known`` (``[B]`` or a number) of the time points that exist: bool ``[B, T]``."""
    return exists & (_rank(exists) < _column(known))


def interpolate(exists: Tensor, missing: Tensor | int) -> Tensor:
    """Observe all time points that exist except number ``missing`` of them (``[B]`` or a number, from 0)."""
    return exists & (_rank(exists) != _column(missing))


def perturb(exists: Tensor, control: Tensor) -> Tensor:
    """Observe the time points that exist and are ``control [B, T]``."""
    return exists & control


def draw_observed(keys: Tensor, exists: Tensor, control: Tensor, weights: dict[str, float]) -> Tensor:
    """Draw what is observed in training, bool ``[B, T]``; at least one time point is always left to generate.

    Parameters
    ----------
    keys
        int64 ``[B]``: the draw is a pure function of them.
    exists, control
        bool ``[B, T]``: time points with cells; populations before a perturbation.
    weights
        Pattern to its weight in the draw; patterns that a trajectory cannot have are left out for it.
    """
    u_B2 = uniform(keys, Stream.PATTERN, 2)
    n_B = exists.sum(1)
    drawn_BPT = torch.stack(
        [
            torch.zeros_like(exists),
            forecast(exists, 1 + (u_B2[:, 1] * (n_B - 1)).long()),
            interpolate(exists, 1 + (u_B2[:, 1] * (n_B - 2)).long()),
            perturb(exists, control),
        ],
        dim=1,
    )
    weight_BP = torch.stack(
        [
            weights["noise"] * torch.ones_like(n_B, dtype=torch.bool),
            weights["forecast"] * (n_B >= 2),
            weights["interpolate"] * (n_B >= 3),
            weights["perturb"] * ((exists & control).any(1) & (exists & ~control).any(1)),
        ],
        dim=1,
    )
    edge_BP = weight_BP.cumsum(1)
    # The first pattern whose edge lies above the draw; where no pattern has weight, the first: noise.
    chosen_B = (u_B2[:, :1] * edge_BP[:, -1:] < edge_BP).int().argmax(1)
    return drawn_BPT[torch.arange(len(keys), device=keys.device), chosen_B]


def _rank(exists: Tensor) -> Tensor:
    """Number of each time point among those that exist, ``[B, T]``."""
    return exists.long().cumsum(1) - 1


def _column(number: Tensor | int) -> Tensor | int:
    return number[:, None] if isinstance(number, Tensor) else number
