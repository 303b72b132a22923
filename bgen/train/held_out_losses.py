"""The held-out losses: means over all ranks' shares, with padding left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.distributed import world as ranks
from bgen.errors import UserError, nearest
from bgen.train.engine.engine import Engine


@torch.no_grad()
def held_out_losses(
    engine: Engine, batches: Iterator[tuple[CellBatch, Tensor]], monitor: str, stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """Mean of each of the module's losses over the held-out cells.

    Parameters
    ----------
    engine
        Computes the losses with its present weights, in evaluation mode.
    batches
        This rank's share of the cells, with weights, as :meth:`bgen.train.stages.stage.Stage.valid_batches` gives it.
    monitor
        Name of the loss that is watched.
    stopped
        Called before each batch on every rank, with the same answer on all; True ends the evaluation, which then
        returns None.

    Raises
    ------
    UserError
        If the module has no loss of that name.
    """
    sums: dict[str, Tensor] = {}
    weights = torch.zeros((), dtype=torch.float64)
    device = ranks.current().device
    engine.train(False)
    try:
        for batch, weight in batches:
            if stopped():
                return None
            losses = engine.forward(engine.moved(batch))
            weights = weights + weight.sum(dtype=torch.float64)
            weight = weight.to(device, torch.float64, non_blocking=True)
            for name, loss in losses.items():
                # Padding may hold anything, also values that are not finite.
                total = torch.where(weight > 0, loss.double() * weight, 0.0).sum()
                sums[name] = sums[name] + total if name in sums else total
    finally:
        engine.train()
    if monitor not in sums:
        raise UserError(f"the held-out losses have no '{monitor}' to watch.{nearest(monitor, sums)}")
    names = sorted(sums)
    totals = torch.cat([torch.stack([sums[name] for name in names]).cpu(), weights[None]])
    *by_name, weight_all = ranks.all_sum(totals).tolist()
    return {name: total / weight_all for name, total in zip(names, by_name, strict=True)}
