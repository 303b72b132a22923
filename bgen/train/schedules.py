"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from bgen.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    r"""Learning rate of the 0-based ``step``.

    Linear warm-up over ``W`` steps, :math:`\eta (s + 1) / W`, then constant, or a half cosine down to
    ``final_lr`` :math:`= f` at the last of ``S`` steps:

    .. math:: \eta \left(f + (1 - f) \tfrac{1}{2} (1 + \cos \pi p)\right), \quad p = (s - W) / (S - 1 - W)
    """
    peak, warmup = config.learning_rate, config.warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    return peak * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
