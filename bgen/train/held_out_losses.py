"""The held-out losses: means over all ranks' shares, with padding left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bgen.distributed import world as ranks
from bgen.errors import UserError, nearest
from bgen.train.engine.engine import Engine
from bgen.train.stages.stage import Stage


@torch.no_grad()
def held_out_losses(engine: Engine, stage: Stage, stopped: Callable[[], bool]) -> dict[str, float] | None:
    """Mean of each of the module's losses over the held-out cells.

    Parameters
    ----------
    engine
        Computes the losses with its present weights, in evaluation mode.
    stage
        Gives the cells.
    stopped
        Called before each batch on every rank, with the same answer on all; True ends the evaluation, which then
        returns None.

    Raises
    ------
    UserError
        If the module has no loss of the name that the stage watches.
    """
    sums: dict[str, Tensor] = {}
    weights = torch.zeros((), dtype=torch.float64)
    device = ranks.current().device
    engine.train(False)
    try:
        for batch, weight in stage.valid_batches():
            if stopped():
                return None
            losses = engine.forward(batch.to(device))
            weight = weight.to(device, torch.float64)
            weights = weights + weight.sum().cpu()
            for name, loss in losses.items():
                # Padding may hold anything, also values that are not finite.
                total = torch.where(weight > 0, loss.double() * weight, 0.0).sum()
                sums[name] = sums[name] + total if name in sums else total
    finally:
        engine.train()
    if stage.monitor not in sums:
        raise UserError(f"the held-out losses have no '{stage.monitor}' to watch.{nearest(stage.monitor, sums)}")
    names = sorted(sums)
    totals = torch.cat([torch.stack([sums[name] for name in names]).cpu(), weights[None]])
    *by_name, weight_all = ranks.all_sum(totals).tolist()
    return {name: total / weight_all for name, total in zip(names, by_name, strict=True)}
