"""Losses of steps on their way into the record: they stay on the device until the record asks for them.

To look at a loss the host must wait until the device has computed it, and meanwhile gives it nothing more to do. So
sums over a rank's cells are kept there, step by step, and come to the host together: one copy and one reduction over
ranks for all steps since the last row of the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bgen.distributed import world as ranks


@dataclass(frozen=True)
class StepMeans:
    """One optimiser step as the record takes it.

    Attributes
    ----------
    losses
        Mean of each loss over the cells of the global batch.
    learning_rate, grad_norm
        As they were.
    applied
        Whether the weights moved.
    """

    losses: dict[str, float]
    learning_rate: float
    grad_norm: float
    applied: bool


class StepLosses:
    """Sums of the losses of steps that the record has not seen yet; all ranks do the same with theirs."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._waiting: list[Tensor] = []
        self._known: list[tuple[int, float, float, bool]] = []

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Take in the losses per cell ``{name: [B]}`` of a micro batch, always of the same names."""
        for name, loss in losses.items():
            total = loss.detach().double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def drop(self) -> None:
        """Forget the step that is being computed."""
        self.sums = {}

    def close(self, cells: int, learning_rate: float, grad_norm: float, applied: bool) -> None:
        """End a step of so many cells on all ranks."""
        self._names = sorted(self.sums)
        self._waiting.append(torch.stack([self.sums[name] for name in self._names]))
        self._known.append((cells, learning_rate, grad_norm, applied))
        self.sums = {}

    def take(self) -> list[StepMeans]:
        """Return the steps since the last call, in order. The host waits here, and the ranks for one another."""
        if not self._waiting:
            return []
        totals = ranks.all_sum(torch.stack(self._waiting).cpu()).tolist()
        steps = [
            StepMeans({name: value / cells for name, value in zip(self._names, row, strict=True)}, rate, norm, applied)
            for row, (cells, rate, norm, applied) in zip(totals, self._known, strict=True)
        ]
        self._waiting, self._known = [], []
        return steps
