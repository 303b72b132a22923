"""Explicit solvers of dz/dt = v(z, t) from t = 1 (noise) down to t = 0 (data), on equal steps.

A step goes from t to s = t + h with h = -1 / steps:

    Euler     z + h v(z, t)                                       order 1, one evaluation a step
    midpoint  z + h v(z + h/2 v(z, t), t + h/2)                   order 2, two evaluations
    Heun      z + h/2 (v(z, t) + v(z + h v(z, t), s))             order 2, two evaluations

``adaptive`` instead chooses its own steps so that an estimate of the error stays below a tolerance: Dormand and Prince,
1980, orders 5 and 4, through torchdiffeq.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""``v(z, t)``: velocity of the same shape as ``z`` at flow time ``t`` in [0, 1]."""

Step = Callable[[Velocity, Tensor, float, float], Tensor]


def euler(v: Velocity, z: Tensor, t: float, s: float) -> Tensor:
    """One Euler step from t to s."""
    return z + (s - t) * v(z, t)


def midpoint(v: Velocity, z: Tensor, t: float, s: float) -> Tensor:
    """One midpoint step from t to s."""
    h = s - t
    return z + h * v(z + h / 2 * v(z, t), t + h / 2)


def heun(v: Velocity, z: Tensor, t: float, s: float) -> Tensor:
    """One step of Heun's method from t to s."""
    h = s - t
    slope = v(z, t)
    return z + h / 2 * (slope + v(z + h * slope, s))


SOLVERS: dict[str, Step] = {"euler": euler, "heun": heun, "midpoint": midpoint}
"""Steps by name."""


def integrate(v: Velocity, z1: Tensor, steps: int, solver: str, tolerance: float = 1e-3) -> Tensor:
    """Carry noise ``z1`` (any shape) at t = 1 to data at t = 0 in ``steps`` equal steps of a named solver.

    ``solver="adaptive"`` takes as many steps as the relative and absolute ``tolerance`` asks for, whatever ``steps``
    says. It measures the error over all of ``z1`` together, so a cell's result depends, within the tolerance, on what
    is integrated beside it.
    """
    if solver == "adaptive":
        from torchdiffeq import odeint  # imports scipy's integration and optimisation: half a second

        ends = torch.linspace(1, 0, 2, dtype=z1.dtype, device=z1.device)
        found: Tensor = odeint(lambda t, z: v(z, float(t)), z1, ends, rtol=tolerance, atol=tolerance, method="dopri5")
        return found[-1]
    step = SOLVERS[solver]
    z = z1
    for i in range(steps):
        z = step(v, z, 1 - i / steps, 1 - (i + 1) / steps)
    return z
