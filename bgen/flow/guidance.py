"""Classifier-free guidance of a velocity, all conditions jointly.

    v = v_0 + w (v_c - v_0)

with the unconditional v_0 and the conditional v_c (Ho and Salimans, 2022). w = 1 is the conditional model itself, w = 0
the unconditional one, w > 1 trades diversity for fidelity; acting in a limited interval of t keeps more of the
diversity (Kynkäänniemi et al., 2024). Outside the interval the conditional velocity is used.
"""

from __future__ import annotations

from torch import Tensor

from bgen.flow.solvers import Velocity


def guide(
    conditional: Velocity, unconditional: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """Combine two velocities; at each t only those that are needed are evaluated.

    ``interval`` is the closed range of t in which the scale ``w`` acts.
    """

    def guided(z: Tensor, t: float) -> Tensor:
        if scale == 1.0 or not interval[0] <= t <= interval[1]:
            return conditional(z, t)
        if scale == 0.0:
            return unconditional(z, t)
        base = unconditional(z, t)
        return base + scale * (conditional(z, t) - base)

    return guided
