"""Fine-tuning for ``annotate``: a classifier on the encoder."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from bgen.config.finetune import FinetuneConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.distributed import world as ranks
from bgen.hub.about import Annotation
from bgen.models.annotator import LABEL, Annotator
from bgen.nn.lora import add_lora, merge_lora
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.finetune.request import RANK, WATCHED, Request
from bgen.tasks.finetune.runs import Runs
from bgen.train.stages.in_memory import MemoryStage, split_watched


def _train_annotator(
    model: AnnDataModel,
    given: NDArray[np.str_],
    cells: MemoryCells,
    config: FinetuneConfig,
    request: Request,
    runs: Runs,
) -> tuple[Annotator, Annotation]:
    assert request.label is not None, "checked at the start"
    names, numbers = np.unique(given[given != ""], return_counts=True)
    codes = pd.Index(names).get_indexer(pd.Index(given)).astype(np.int64)
    weights = numbers.sum() / (len(names) * numbers)
    annotator = Annotator(model.saved.vae, torch.from_numpy(weights).float())
    if request.mode == "lora":
        add_lora(annotator.vae.encoder, RANK)
    else:
        annotator.vae.encoder.requires_grad_(request.mode == "full")
    annotator.head.requires_grad_(True)
    labelled = MemoryCells(cells.counts, {**cells.obs, LABEL: codes})
    train, valid = split_watched(np.flatnonzero(codes >= 0), WATCHED, config.seed)
    facts = runs.fingerprint(model.saved)
    runs.fit(config, MemoryStage(config, annotator, labelled, train, valid, ranks.current(), facts))
    merge_lora(annotator.vae.encoder)
    annotator.requires_grad_(False)
    return annotator, Annotation(label=request.label, labels=names.tolist())
