"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from bgen.config.train import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    r"""Learning rate of the 0-based ``step``.

    Linear warm-up over ``W`` steps, :math:`\eta (s + 1) / W`, then constant, or a half cosine down to
    ``final_lr`` :math:`= f` at the last of ``S`` steps:

    .. math:: \eta \left(f + (1 - f) \tfrac{1}{2} (1 + \cos \pi p)\right), \quad p = (s - W) / (S - 1 - W)

    "wsd" (warm-up, stable, decay; Hu et al. 2024) stays constant until the last ``D = decay S`` steps and then falls
    linearly, so that a run can be lengthened from any checkpoint before them:

    .. math:: \eta \left(1 - (1 - f) q\right), \quad q = (s - (S - D) + 1) / D
    """
    peak, warmup = config.learning_rate, config.warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        stretch = max(1, round(config.decay * config.steps))
        fallen = min(1.0, max(0.0, (step - (config.steps - stretch) + 1) / stretch))
        return peak * (1 - (1 - config.final_lr) * fallen)
    progress = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    return peak * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
