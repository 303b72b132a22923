"""Fine-tuning for ``annotate``: a classifier on the encoder."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from bgen.data.cells_in_memory import MemoryCells
from bgen.distributed import world as ranks
from bgen.errors import UserError
from bgen.hub.about import About, Annotation
from bgen.hub.directory import Module, SavedModel
from bgen.models.annotator import LABEL, Annotator
from bgen.nn.lora import add_lora, merge_lora
from bgen.tasks.cells.annotate import LEAST_CELLS, without_rare
from bgen.tasks.columns import text_column
from bgen.tasks.finetune.request import RANK, WATCHED, Request
from bgen.tasks.finetune.task import Job, Task
from bgen.train.stages.in_memory import MemoryStage, split_watched


class Annotate(Task[NDArray[np.str_]]):
    """Labels of cells; prepared are the user's own ``[N]``, "" where there is none that can be learned."""

    def require(self, request: Request) -> None:
        """See :class:`Task`."""
        super().require(request)
        if request.label is None:
            raise UserError("--task annotate needs --label, the obs column with the labels.")

    def check(self, parent: SavedModel, adata: AnnData, request: Request) -> None:
        """See :class:`Task`."""
        parent.require_vae()
        given = self.prepare(parent, adata, request)
        names, numbers = np.unique(given[given != ""], return_counts=True)
        short = [f"{name} ({n})" for name, n in zip(names, numbers, strict=True) if n < LEAST_CELLS]
        if len(names) < 2 or short:
            raise UserError(
                f"obs['{request.label}'] must hold at least two labels with at least {LEAST_CELLS} cells each;"
                f" {'too few: ' + ', '.join(short) if short else 'it holds ' + str(len(names))}."
            )

    def understood(self, adata: AnnData, request: Request) -> list[str]:
        """See :class:`Task`."""
        assert request.label is not None, "checked at the start"
        _, rare = without_rare(text_column(adata, request.label))
        if not rare:
            return []
        named = ", ".join(f"{name} ({n})" for name, n in rare.items())
        return [f"Labels with fewer than {LEAST_CELLS} cells are not learned: {named}."]

    def prepare(self, grown: SavedModel, adata: AnnData, request: Request) -> NDArray[np.str_]:
        """See :class:`Task`."""
        assert request.label is not None, "checked at the start"
        return without_rare(text_column(adata, request.label))[0]

    def train(self, job: Job, prepared: NDArray[np.str_]) -> tuple[Module, About]:
        """See :class:`Task`."""
        names, numbers = np.unique(prepared[prepared != ""], return_counts=True)
        codes = pd.Index(names).get_indexer(pd.Index(prepared)).astype(np.int64)
        weights = numbers.sum() / (len(names) * numbers)
        annotator = Annotator(job.grown.vae, torch.from_numpy(weights).float())
        if job.request.mode == "lora":
            add_lora(annotator.vae.encoder, RANK)
        else:
            annotator.vae.encoder.requires_grad_(job.request.mode == "full")
        annotator.head.requires_grad_(True)
        labelled = MemoryCells(job.memory.counts, {**job.memory.obs, LABEL: codes})
        config = job.settings("vae", "annotator")
        train, valid = split_watched(np.flatnonzero(codes >= 0), WATCHED, config.seed)
        facts = job.runs.fingerprint(job.grown)
        job.runs.fit(config, MemoryStage(config, annotator, labelled, train, valid, ranks.current(), facts))
        merge_lora(annotator.vae.encoder)
        annotator.requires_grad_(False)
        assert job.request.label is not None, "checked at the start"
        said = Annotation(label=job.request.label, labels=names.tolist())
        return annotator, job.about.model_copy(update={"annotation": said})
