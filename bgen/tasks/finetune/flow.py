"""Fine-tuning for ``generate``: the flow of the parent goes on."""

from __future__ import annotations

from anndata import AnnData

from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.hub.about import About
from bgen.hub.directory import Module, SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.nn.lora import add_lora, merge_lora
from bgen.tasks.finetune.request import RANK, Mode, Request, require_wide_layers
from bgen.tasks.finetune.task import Job, Task
from bgen.train.stages.in_memory import MemoryStage


class Generate(Task[None]):
    """New cells like the user's."""

    def check(self, parent: SavedModel, adata: AnnData, request: Request) -> None:
        """See :class:`Task`."""
        if not isinstance(parent.module, LatentFlow):
            raise UserError(f"This model is a {parent.kind}; --task generate needs a flow (bgen train, stage: flow).")
        require_wide_layers(parent, request)

    def prepare(self, grown: SavedModel, adata: AnnData, request: Request) -> None:
        """See :class:`Task`."""

    def train(self, job: Job, prepared: None) -> tuple[Module, About]:
        """See :class:`Task`."""
        flow = job.grown.module
        assert isinstance(flow, LatentFlow), "checked at the start"
        choose_trained(flow, job.request.mode)
        config = job.settings("flow", "flow")
        facts = job.runs.fingerprint(job.grown)
        job.runs.fit(config, MemoryStage(config, flow, job.memory, *job.watched, ranks.current(), facts))
        merge_lora(flow.backbone)
        return flow, job.about


def choose_trained(flow: LatentFlow, mode: Mode) -> None:
    """Choose which of the flow's parameters are trained; lora: give it its low-rank changes."""
    flow.conditions.requires_grad_(True)
    flow.backbone.requires_grad_(mode == "full")
    if mode == "lora":
        add_lora(flow.backbone, RANK)
    elif mode == "head":
        flow.backbone.head.requires_grad_(True)
