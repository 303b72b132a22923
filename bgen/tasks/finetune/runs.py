"""The trainings of one fine-tuning, one run folder each, and what makes it possible to go on with them.

A resume passes through all of them again, in order: a finished one gives its weights back, an interrupted one goes on
from its newest checkpoint, as ``bgen train --resume`` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from anndata import AnnData

from bgen.config.finetune import FinetuneConfig
from bgen.config.run import RunConfig
from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError
from bgen.files import require_new_folder
from bgen.hub.directory import SavedModel
from bgen.tasks.finetune.request import Request
from bgen.track.output import RECORD
from bgen.train.stages.in_memory import MemoryStage
from bgen.train.trainer import Trainer, TrainResult


class Interrupted(UserError):
    """A signal ended the training; ``exit_code`` is ``train.requeue_exit``, as it is for ``bgen train``."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Runs:
    """How all trainings of one fine-tuning are run.

    Attributes
    ----------
    resume
        Go on with those that are there.
    facts
        From :func:`request_fingerprint`.
    say
        Told what happens.
    """

    resume: bool
    facts: dict[str, str]
    say: Callable[[str], None]

    def fingerprint(self, saved: SavedModel) -> dict[str, Any]:
        """Return what a resume must find again: also the weights that the training begins with."""
        return {**self.facts, "start": saved.fingerprint()}

    def fit(self, config: RunConfig, stage: MemoryStage) -> TrainResult:
        """Train; afterwards the module has the weights to keep, where the data lie.

        Raises
        ------
        Interrupted
            After a signal, with a checkpoint saved.
        """
        result = Trainer(config, stage).fit(self.resume)
        if result.interrupted:
            raise Interrupted(
                f"Stopped by a signal at step {result.step} of {config.out}; nothing is exported yet. Give the same"
                " command --resume to go on.",
                config.train.requeue_exit,
            )
        stage.module.cpu()
        return result


def require_new_run(out: Path) -> None:
    """Raise UserError if a folder holds something already."""
    if any(out.glob(f"*/{RECORD}")):
        raise UserError(f"{out} already holds a run. Give --resume to go on with it, or choose another --out.")
    require_new_folder(out)


def run_config(base: FinetuneConfig, stage: Literal["vae", "flow"], out: Path) -> FinetuneConfig:
    """Return the configuration of one training, in the folder ``out``."""
    return base.model_copy(update={"stage": stage, "out": out})


def request_fingerprint(parent: SavedModel, adata: AnnData, cells: MemoryCells, request: Request) -> dict[str, str]:
    """Return what must be the same when fine-tuning is resumed: the parent, the cells and what is asked of them."""
    table = adata.obs[request.named_columns].astype(str)
    digest = hashlib.sha256(cells.digest().encode())
    digest.update(pd.util.hash_pandas_object(table).to_numpy().tobytes())
    asked = json.dumps(asdict(replace(request, access=None)), default=str)
    return {"parent": parent.fingerprint(), "cells": digest.hexdigest(), "request": asked}
