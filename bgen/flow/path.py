"""The straight path between data and noise.

    z_t = (1 - t) z_0 + t z_1,    v = dz_t/dt = z_1 - z_0

z_0 is data, z_1 ~ N(0, I) is noise; sampling integrates from t = 1 down to t = 0. (Rectified flow: Liu, Gong and Liu,
2023; flow matching: Lipman et al., 2023. Both write time the other way round in places.)

Axes: B trajectories, T time points, N cells per time point, D latent size.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST_TIME = 0.05
"""Below this t, :func:`velocity_from_data` divides by this instead of by t."""


def over_cells(t: Tensor) -> Tensor:
    """Flow time ``[B, T]`` shaped ``[B, T, 1, 1]``, to go with ``[B, T, N, D]``."""
    return t[..., None, None]


def interpolate(z0: Tensor, z1: Tensor, t: Tensor) -> Tensor:
    """``z_t [B, T, N, D]`` at flow times ``t [B, T]``."""
    t = over_cells(t)
    return (1 - t) * z0 + t * z1


def velocity(z0: Tensor, z1: Tensor) -> Tensor:
    """The velocity that carries ``z0`` to ``z1``; the same at every t."""
    return z1 - z0


def velocity_from_data(z_t: Tensor, predicted_z0: Tensor, t: Tensor) -> Tensor:
    """Turn a prediction of the data into a velocity: ``(z_t - z_0) / max(t, 0.05)``, with ``t [B, T]``.

    Training and sampling use this same formula under a loss on the velocity, so below t = 0.05 the network learns
    ``z_t - 0.05 v`` instead of z_0, and the velocity stays right down to t = 0.
    """
    return (z_t - predicted_z0) / over_cells(t).clamp_min(SMALLEST_TIME)
