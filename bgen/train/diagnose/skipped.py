"""Why a step was skipped: its cells, and the module that first gave a number that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bgen.data.batch import CellBatch
from bgen.data.packed import PackedBatch
from bgen.distributed import world as ranks
from bgen.train.diagnose.not_finite import first_not_finite


@dataclass(frozen=True)
class Skipped:
    """What is known of a step that was not applied.

    Attributes
    ----------
    reason
        "loss" or "gradient" (not finite) or "spike".
    what, why
        The same in words, of one step and of several.
    cells
        Those whose loss is not finite; if there are none, all of the step.
    first
        The module that gave the first number that is not finite.
    """

    reason: str
    what: str
    why: str
    cells: list[int]
    first: str | None

    @property
    def where(self) -> str:
        """Return ``", first in MODULE"``, if that is known."""
        return "" if self.first is None else f", first in {self.first}"

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the record says."""
        where = {} if self.first is None else {"first": self.first}
        return {"reason": self.reason, "cells": self.cells, **where}


def look_at_skipped(
    module: nn.Module,
    forward: Callable[[CellBatch | PackedBatch], object],
    micro_batches: Sequence[CellBatch | PackedBatch],
    unfinite: Sequence[Tensor],
    spike: float | None,
) -> Skipped:
    """Find out why a step was skipped; all ranks call it together, each with its micro batches.

    Parameters
    ----------
    forward
        Puts a batch through the module, as training did.
    unfinite
        For each micro batch, which of its cells ``[B]`` have a loss that is not finite.
    spike
        The loss, if it was a spike.
    """
    pairs = list(zip(micro_batches, unfinite, strict=True))
    guilty = [cell for batch, mask in pairs for cell in batch.cells[mask.cpu()].tolist()]
    # Every rank looks, each at a batch of its own: at ZeRO 3 a forward pass takes all of them.
    again = next((batch for batch, mask in pairs if bool(mask.any())), micro_batches[-1])
    origin = None if spike is not None else first_not_finite(module, lambda: forward(again))
    every = [cell for batch, _ in pairs for cell in batch.cells.tolist()]
    by_rank = ranks.gather((guilty, every, origin))
    cells = [cell for found, _, _ in by_rank for cell in found]
    first = next((found for _, _, found in by_rank if found is not None), None)
    everything = [cell for _, of_rank, _ in by_rank for cell in of_rank]
    if spike is not None:
        why = "a loss far above those before"
        return Skipped("spike", f"loss {spike:.4g} is a spike", why, cells or everything, first)
    reason = "loss" if cells else "gradient"
    what, why = f"{reason} not finite", f"a {reason} that was not finite"
    return Skipped(reason, what, why, cells or everything, first)
