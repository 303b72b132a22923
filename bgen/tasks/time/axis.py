"""What a model knows of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bgen.arrays import F64
from bgen.errors import UserError
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow


def trained_over_time(model: SavedModel) -> bool:
    """Whether the model was trained on trajectories over time: of systems, or of what perturbations do to them."""
    shape = model.about.trajectories
    return shape is not None and (shape.along == "time" or shape.times > 2) and "time" in model.about.roles


@dataclass(frozen=True)
class TimeAxis:
    """What a model knows of time.

    Attributes
    ----------
    column
        obs column of the times.
    unit
        Their unit, in words.
    trained
        Distinct times of the training cells, ascending.
    system
        obs columns that name a system.
    times, cells
        Time points of a training trajectory (T), and cells of each (N), at most.
    """

    column: str
    unit: str
    trained: F64
    system: list[str]
    times: int
    cells: int

    @classmethod
    def of(cls, model: SavedModel) -> TimeAxis:
        """Read it from a model; UserError if that was not trained on trajectories over time."""
        about, shape = model.about, model.about.trajectories
        if not isinstance(model.module, LatentFlow) or shape is None or not trained_over_time(model):
            raise UserError(
                "This model knows single cells only, not how populations change: it was not trained on trajectories"
                " over time. Train one with `bgen train trajectories data.store=... flow.vae=...`."
            )
        return cls(
            column=about.roles["time"],
            unit=about.units.get("time", ""),
            trained=np.array(about.times, dtype=np.float64),
            system=[about.roles.get(name, name) for name in shape.system],
            times=shape.times,
            cells=shape.cells,
        )

    def named(self, time: float) -> str:
        """Return a time with its unit."""
        return f"{time:g} {self.unit}".strip()

    def require_known(self, times: Sequence[float] | F64) -> None:
        """Raise UserError for a time outside those of training."""
        low, high = float(self.trained[0]), float(self.trained[-1])
        for time in times:
            if not low <= time <= high:
                raise UserError(
                    f"Time {self.named(time)} lies outside the times of the training cells, {low:g} to"
                    f" {self.named(high)}: the model has not learned anything about it. Ask for a time within, or train"
                    " on data that reach it."
                )
