"""What is asked of fine-tuning, and the check, before training, that parent and data allow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bgen.config.data import Access
from bgen.errors import UserError
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.nn.lora import lora_layers
from bgen.tasks.perturb.screen import Columns
from bgen.tasks.user_cells import Reading

Mode = Literal["full", "lora", "head"]
MODES = ("full", "lora", "head")
LEAST_CELLS = 30
RANK = 8
"""Rank of low-rank changes."""


@dataclass(frozen=True)
class Request:
    """What to fine-tune for.

    Attributes
    ----------
    task, mode
        What is trained, one of :data:`bgen.tasks.finetune.registry.TASKS`, and how much of it.
    label
        annotate: obs column of labels.
    columns
        perturb: how the data says what was done to a cell.
    counts, gene_column, floor, layer, access
        How the cells are read: see :class:`bgen.tasks.user_cells.Reading`.
    time, system
        time: obs column of the times, and the obs columns that name a trajectory.
    add_genes
        Give the model the data's genes that it does not know; otherwise they are left out.
    hold_out
        perturb: labels (``LABEL`` or ``LABEL@DOSE``) to keep from training and to score predictions on.
    network
        perturb: CSV of a regulatory network, for targets that are not in the data.
    """

    task: str
    mode: Mode = "full"
    label: str | None = None
    columns: Columns | None = None
    counts: str | None = None
    gene_column: str | None = None
    floor: float | None = None
    layer: str | None = None
    access: Access | None = None
    add_genes: bool = False
    hold_out: Sequence[str] = ()
    time: str | None = None
    system: Sequence[str] = ()
    network: Path | None = None

    @property
    def named_columns(self) -> list[str]:
        """The obs columns that are named, which must be there."""
        named = [self.label, self.time, *self.system]
        if self.columns is not None:
            named += [self.columns.perturbation, self.columns.dose, *self.columns.strata]
        return [name for name in dict.fromkeys(named) if name is not None]

    @property
    def reading(self) -> Reading:
        """How the cells are read."""
        return Reading(
            counts=self.counts,
            gene_column=self.gene_column,
            floor=self.floor,
            layer=self.layer,
            access=self.access,
        )


def require_cells_enough(n_cells: int) -> None:
    """Raise UserError if there are too few cells to train on."""
    if n_cells < LEAST_CELLS:
        raise UserError(f"The data has {n_cells} cells; fine-tuning needs at least {LEAST_CELLS}.")


def require_wide_layers(parent: SavedModel, request: Request) -> None:
    """Raise UserError if the parent's flow is too narrow for low-rank changes and they are asked for."""
    flow = parent.module
    if request.mode == "lora" and isinstance(flow, LatentFlow) and not lora_layers(flow.backbone, RANK):
        raise UserError(
            f"--mode lora: no layer of the model's flow is {4 * RANK} wide or more, so low-rank changes would save"
            " nothing. Take --mode full or head."
        )


WATCHED = 0.15
"""Share of the cells that early stopping watches."""
