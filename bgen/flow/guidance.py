"""Classifier-free guidance of a velocity, by all conditions jointly and by each of them.

    v = v_c + (w - 1) (v_c - v_0) + sum over conditions k of (w_k - 1) (v_c - v_-k)

with the conditional v_c, the unconditional v_0 (Ho and Salimans, 2022), and v_-k, where only condition k is hidden: it
strengthens what k adds to all others. w = 1 is the conditional model itself, w = 0 the unconditional one, w > 1 trades
diversity for fidelity; of a model with one condition, w_k does what w does. Acting in a limited interval of t keeps
more of the diversity (Kynkäänniemi et al., 2024). Outside the interval the conditional velocity is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bgen.flow.solvers import Velocity


def guide(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    without: Sequence[tuple[Velocity, float]] = (),
) -> Velocity:
    """Combine velocities; at each t only those that are needed are evaluated.

    ``interval`` is the closed range of t in which the scales act; ``without`` has the velocity with one condition
    hidden, and that condition's scale.
    """

    def guided(z: Tensor, t: float) -> Tensor:
        acting = interval[0] <= t <= interval[1]
        parts = [(v, w) for v, w in without if w != 1.0] if acting else []
        if scale == 0.0 and acting and not parts:
            return unconditional(z, t)
        told = conditional(z, t)
        total = told
        if scale != 1.0 and acting:
            base = unconditional(z, t)
            total = base + scale * (told - base)
        for v, w in parts:
            total = total + (w - 1.0) * (told - v(z, t))
        return total

    return guided
