"""What a mixer is told about its points: which exist, when they are, and which sequence each belongs to.

Axes: B sequences, L points (time points, or cells of one population).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bgen.errors import UserError


@dataclass(frozen=True)
class Points:
    """What a mixer is told about the points of its axis.

    Attributes
    ----------
    valid_BL
        bool: points that exist. Others are padding or were not observed: they neither influence nor are read.
        None: all exist.
    time_BL
        Time of each point, ascending over the valid points of a sequence, in units of ``time.scale``. None: the points
        have no order in time (cells), or stand at 0, 1, 2, ...
    sequence_BL
        Number of the sequence that each point belongs to, where several are packed one after the other. None: one.
    """

    valid_BL: Tensor | None = None
    time_BL: Tensor | None = None
    sequence_BL: Tensor | None = None

    def reversed(self) -> Points:
        """Return the points from last to first. Time is negated: it still ascends, and gaps are computed anew."""
        return Points(
            valid_BL=None if self.valid_BL is None else self.valid_BL.flip(1),
            time_BL=None if self.time_BL is None else -self.time_BL.flip(1),
            sequence_BL=None if self.sequence_BL is None else self.sequence_BL.flip(1),
        )

    def beside(self, other: Points) -> Points:
        """Stack with points of the same kind along the batch axis."""

        def both(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else torch.cat([mine, theirs])

        return Points(
            both(self.valid_BL, other.valid_BL),
            both(self.time_BL, other.time_BL),
            both(self.sequence_BL, other.sequence_BL),
        )

    def repeated(self, times: int) -> Points:
        """Repeat every sequence ``times`` times in a row along the batch axis."""

        def repeat(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.repeat_interleave(times, dim=0)

        return Points(repeat(self.valid_BL), repeat(self.time_BL), repeat(self.sequence_BL))

    def blank(self, x_BLD: Tensor) -> Tensor:
        """Set points that do not exist to zero, whatever stands there, be it NaN."""
        if self.valid_BL is None:
            return x_BLD
        return torch.where(self.valid_BL[..., None], x_BLD, x_BLD.new_zeros(()))


def continues(sequence_BL: Tensor) -> Tensor:
    """Whether each point belongs to the sequence of the point before it, bool ``[B, L]``; true at the first point."""
    return F.pad(sequence_BL[:, 1:] == sequence_BL[:, :-1], (1, 0), value=True)


def previous_valid(points: Points, length: int, device: torch.device) -> Tensor:
    """Index of the last valid point before each point, int64 ``[B, L]`` or ``[1, L]``; -1 where there is none.

    In a packed row the point found may belong to the sequence before; compare ``sequence_BL``.
    """
    index_1L = torch.arange(length, device=device)[None]
    if points.valid_BL is None:
        return index_1L - 1
    last_BL = torch.where(points.valid_BL, index_1L, -1).cummax(dim=1).values
    return torch.cat([torch.full_like(last_BL[:, :1], -1), last_BL[:, :-1]], dim=1)


def check_ascending(points: Points) -> None:
    """Raise a UserError if time runs backwards between valid points of one sequence."""
    if points.time_BL is None:
        return
    step_BL, _, linked_BL = _steps(points)
    wrong_BL = linked_BL & ~(step_BL >= 0)  # also where time is NaN
    if bool(wrong_BL.any()):
        row, column = (int(i) for i in wrong_BL.nonzero()[0])
        raise UserError(
            f"trajectory {row} of the batch: time goes from {_value(points, row, column, step_BL)} "
            "(times must ascend); sort its time points by time"
        )


def check_regular(points: Points, mixer: str, tolerance: float = 1e-3) -> None:
    """Raise a UserError unless valid points stand as many units of time apart as they stand places apart.

    Otherwise mixers whose weights belong to places (convolutions) would take unequal gaps for equal ones.
    """
    if points.sequence_BL is not None:
        raise UserError(f"{mixer} cannot keep packed sequences apart; give it one sequence per row, padded")
    if points.time_BL is None:
        return
    step_BL, places_BL, linked_BL = _steps(points)
    wrong_BL = linked_BL & ~((step_BL - places_BL).abs() <= tolerance * places_BL)
    if bool(wrong_BL.any()):
        row, column = (int(i) for i in wrong_BL.nonzero()[0])
        raise UserError(
            f"{mixer} needs time points one unit of time apart (time_scale sets the unit), but trajectory {row} of the "
            f"batch goes from {_value(points, row, column, step_BL)} in {int(places_BL[row, column])} step(s); set "
            "time_scale to the spacing of a regular grid, or use mamba2 with real_time, s4d in recurrent form or "
            "attention, which take any times"
        )


def _steps(points: Points) -> tuple[Tensor, Tensor, Tensor]:
    """Time and places since the valid point before, and whether both are valid and of one sequence: each ``[B, L]``."""
    assert points.time_BL is not None
    time_BL = points.time_BL
    before_BL = previous_valid(points, time_BL.shape[1], time_BL.device).expand(time_BL.shape)
    linked_BL = before_BL >= 0
    if points.valid_BL is not None:
        linked_BL = linked_BL & points.valid_BL
    from_BL = before_BL.clamp_min(0)
    if points.sequence_BL is not None:
        linked_BL = linked_BL & (points.sequence_BL.gather(1, from_BL) == points.sequence_BL)
    places_BL = torch.arange(time_BL.shape[1], device=time_BL.device) - before_BL
    return time_BL - time_BL.gather(1, from_BL), places_BL, linked_BL


def _value(points: Points, row: int, column: int, step_BL: Tensor) -> str:
    assert points.time_BL is not None
    now = float(points.time_BL[row, column])
    return f"{now - float(step_BL[row, column]):g} to {now:g}"
