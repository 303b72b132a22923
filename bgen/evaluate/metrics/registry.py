"""All metrics by key: what protocols choose from."""

from __future__ import annotations

from typing import Any

from bgen.errors import UserError, nearest
from bgen.evaluate.metrics import conditions, counts, distribution, effects
from bgen.evaluate.metrics.metric import Metric

_OWN: tuple[Metric[Any], ...] = (*distribution.METRICS, *counts.METRICS, *conditions.METRICS, *effects.METRICS)

METRICS: dict[str, Metric[Any]] = {metric.key: metric for metric in _OWN}
"""Key to metric."""


def choose_metrics(*keys: str) -> tuple[Metric[Any], ...]:
    """Return metrics by their keys, in that order.

    Raises
    ------
    UserError
        If there is no metric of that key.
    """
    for key in keys:
        if key not in METRICS:
            raise UserError(f"There is no metric '{key}'.{nearest(key, METRICS)}")
    return tuple(METRICS[key] for key in keys)
