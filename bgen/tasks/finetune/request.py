"""What is asked of fine-tuning, and whether the parent and the data can give it: what is checked before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.nn.lora import lora_layers
from bgen.tasks.perturb.screen import Columns, require_controls
from bgen.tasks.user_cells import text_column

Task = Literal["generate", "annotate", "perturb", "time"]
Mode = Literal["full", "lora", "head"]
LEAST_CELLS = 30
RANK = 8
"""Of low-rank changes."""


@dataclass(frozen=True)
class Request:
    """What to fine-tune for.

    Attributes
    ----------
    task, mode
        See the module.
    label
        annotate: obs column of labels.
    columns
        perturb: how the data says what was done to a cell.
    layer
        Layer with the raw counts; None: X.
    time, system
        time: obs column of the times, and the obs columns that name a trajectory.
    add_genes
        Give the model the data's genes that it does not know; otherwise they are left out.
    floor
        Least share of the model's genes that the data must have.
    hold_out
        perturb: labels (``LABEL`` or ``LABEL@DOSE``) to keep from training and to score predictions on.
    network
        perturb: CSV of a regulatory network, for targets that are not in the data.
    """

    task: Task
    mode: Mode = "full"
    label: str | None = None
    columns: Columns | None = None
    layer: str | None = None
    add_genes: bool = False
    floor: float = 0.8
    hold_out: Sequence[str] = ()
    time: str | None = None
    system: Sequence[str] = ()
    network: Path | None = None


def require_possible(parent: SavedModel, adata: AnnData, request: Request) -> None:
    """Raise UserError if there are too few cells, or the parent's flow cannot do what is asked."""
    flow = parent.module
    if adata.n_obs < LEAST_CELLS:
        raise UserError(f"The data has {adata.n_obs} cells; fine-tuning needs at least {LEAST_CELLS}.")
    if request.task == "generate" and not isinstance(flow, LatentFlow):
        raise UserError(f"This model is a {parent.kind}; --task generate needs a flow (bgen train, stage: flow).")
    if request.mode != "lora" or request.task not in ("generate", "time") or not isinstance(flow, LatentFlow):
        return
    if not lora_layers(flow.backbone, RANK):
        raise UserError(
            f"--mode lora: no layer of the model's flow is {4 * RANK} wide or more, so low-rank changes would save"
            " nothing. Take --mode full or head."
        )


def check_columns(adata: AnnData, request: Request) -> NDArray[np.str_]:
    """Raise UserError for what is wrong with the task's columns, before anything is trained; return its labels."""
    if request.task in ("generate", "time"):
        return np.full(adata.n_obs, "")
    if request.task == "perturb":
        if request.columns is None:
            raise UserError("--task perturb needs --perturbation COLUMN and --control VALUE.")
        for name in (*request.columns.strata, request.columns.perturbation):
            given = text_column(adata, name)
        require_controls(given, request.columns.control, f"obs['{request.columns.perturbation}']")
        if set(given) <= {request.columns.control, ""}:
            raise UserError(
                f"All cells of obs['{request.columns.perturbation}'] are controls: there is nothing to learn from."
            )
        return given
    if request.label is None:
        raise UserError("--task annotate needs --label: the obs column with the labels.")
    given = text_column(adata, request.label)
    names, numbers = np.unique(given[given != ""], return_counts=True)
    short = [f"{name} ({n})" for name, n in zip(names, numbers, strict=True) if n < 5]
    if len(names) < 2 or short:
        raise UserError(
            f"obs['{request.label}'] must hold at least two labels with at least 5 cells each;"
            f" {'too few: ' + ', '.join(short) if short else 'it holds ' + str(len(names))}."
        )
    return given


WATCHED = 0.15
"""Share of the cells that early stopping watches."""
