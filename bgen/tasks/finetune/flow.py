"""Fine-tuning for ``generate``: the flow of the parent goes on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bgen.config.finetune import FinetuneConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.distributed import world as ranks
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.nn.lora import add_lora, merge_lora
from bgen.tasks.finetune.request import RANK, Mode
from bgen.tasks.finetune.runs import Runs
from bgen.train.stages.in_memory import MemoryStage


def _train_flow(
    grown: SavedModel,
    cells: MemoryCells,
    watched: tuple[NDArray[np.int64], NDArray[np.int64]],
    config: FinetuneConfig,
    mode: Mode,
    runs: Runs,
) -> LatentFlow:
    flow = grown.module
    assert isinstance(flow, LatentFlow), "checked at the start"
    _choose_trained(flow, mode)
    runs.fit(config, MemoryStage(config, flow, cells, *watched, ranks.current(), runs.fingerprint(grown)))
    merge_lora(flow.backbone)
    return flow


def _choose_trained(flow: LatentFlow, mode: Mode) -> None:
    """Choose which of the flow's parameters are trained; lora: give it its low-rank changes."""
    flow.conditions.requires_grad_(True)
    flow.backbone.requires_grad_(mode == "full")
    if mode == "lora":
        add_lora(flow.backbone, RANK)
    elif mode == "head":
        flow.backbone.head.requires_grad_(True)
