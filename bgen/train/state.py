"""The part of a run's state that is plain numbers: saved as JSON in every checkpoint, restored exactly."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

SPIKE_WINDOW = 128
SPIKE_LEAST = 32


@dataclass
class RunState:
    """Where a run is.

    Attributes
    ----------
    run
        Identifier, the same across restarts.
    step
        Optimiser steps done, counting the skipped ones.
    skipped, skipped_in_row
        Steps skipped because a loss or gradient was not finite, or the loss was a spike: in all, and in a row.
    best, best_step
        Lowest held-out loss so far, and where.
    worse_in_row
        Evaluations since then.
    stopped_early
        True once there were ``patience`` of these.
    evaluating
        True in a checkpoint that was saved during an evaluation, which is then done first after a resume.
    recent
        Losses of the last applied steps, by which a spike is told.
    sums, summed
        Sums of losses, gradient norm and learning rate over the steps since the last row of the record, and how many.
    """

    run: str
    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    best: float | None = None
    best_step: int | None = None
    worse_in_row: int = 0
    stopped_early: bool = False
    evaluating: bool = False
    recent: list[float] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON values; floats survive exactly, also sums that are not finite, which JSON has no number for."""
        sums = {name: value if math.isfinite(value) else str(value) for name, value in self.sums.items()}
        return dataclasses.asdict(self) | {"sums": sums}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> RunState:
        """The inverse of :meth:`to_json`."""
        return cls(**tree | {"sums": {name: float(value) for name, value in tree["sums"].items()}})

    def add(self, values: dict[str, float]) -> None:
        """Take in one applied step's values, always of the same names."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.summed += 1

    def is_spike(self, loss: float, sigmas: float) -> bool:
        """Whether a loss is ``sigmas`` standard deviations above the last ones; needs 32 of them.

        Centre and deviation are the median and 1.4826 times the median absolute deviation: earlier spikes among the
        last losses do not move these.
        """
        if sigmas == 0 or len(self.recent) < SPIKE_LEAST:
            return False
        centre = statistics.median(self.recent)
        return loss > centre + sigmas * 1.4826 * statistics.median(abs(value - centre) for value in self.recent)

    def remember(self, loss: float) -> None:
        """Keep an applied step's loss among the last 128."""
        self.recent = [*self.recent, loss][-SPIKE_WINDOW:]

    def take_means(self) -> dict[str, float]:
        """Means since the last call; empty if every step was skipped."""
        means = {name: total / self.summed for name, total in self.sums.items()} if self.summed else {}
        self.sums, self.summed = {}, 0
        return means

    def evaluated(self, loss: float, patience: int) -> bool:
        """Take in a held-out loss; return whether it is the best so far. ``patience`` 0 never stops."""
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best, self.best_step, self.worse_in_row = loss, self.step, 0
            return True
        self.worse_in_row += 1
        self.stopped_early = 0 < patience <= self.worse_in_row
        return False
