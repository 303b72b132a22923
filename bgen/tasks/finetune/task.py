"""The base of all tasks of fine-tuning: what a task needs, and how it trains on the adapted autoencoder."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from bgen.config.finetune import FinetuneConfig
from bgen.config.load import load_finetune
from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError
from bgen.evaluate.protocols.perturbation_scores import PerturbationScores
from bgen.hub.about import About
from bgen.hub.directory import ColumnInfo, Module, SavedModel
from bgen.progress import Say
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.finetune.request import Request
from bgen.tasks.finetune.runs import Runs, run_config
from bgen.tasks.user_cells import UserCells, UserData

Prepared = TypeVar("Prepared")
"""What a task reads before anything is trained."""


@dataclass(frozen=True)
class Job:
    """What a task trains on.

    Attributes
    ----------
    grown
        The parent, with rows for what is new in the data and with its autoencoder adapted.
    cells
        The user's cells, matched to it.
    memory
        Their counts and every column that the model knows, as batches are drawn from them.
    watched
        Rows to train on, and rows that early stopping watches.
    config
        Settings of fine-tuning.
    out
        Folder of the runs.
    request
        What is asked for.
    runs
        Runs trainings, and goes on with interrupted ones.
    about
        What every fine-tuned model says of itself.
    """

    grown: SavedModel
    cells: UserCells
    memory: MemoryCells
    watched: tuple[NDArray[np.int64], NDArray[np.int64]]
    config: FinetuneConfig
    out: Path
    request: Request
    runs: Runs
    about: About

    @property
    def model(self) -> AnnDataModel:
        """The grown model, to encode cells with."""
        return AnnDataModel(self.grown)

    def settings(self, stage: Literal["vae", "flow"], folder: str) -> FinetuneConfig:
        """Return the settings of one training, in a folder of its own."""
        return run_config(self.config, stage, self.out / folder)


class Task(abc.ABC, Generic[Prepared]):
    """A task of fine-tuning; see the page of this folder for how to add one."""

    def require(self, request: Request) -> None:
        """Raise UserError for options that are missing or belong to another task; nothing is read yet."""
        if request.network is not None:
            raise UserError(
                f"--network is about unseen targets of --task perturb, not of --task {request.task}: leave it out."
            )
        if request.hold_out:
            raise UserError(f"--hold-out is about --task perturb, not about --task {request.task}: leave it out.")

    def check(self, parent: SavedModel, adata: AnnData, request: Request) -> None:
        """Raise UserError if the parent or the data cannot give what is asked for; nothing is trained yet."""

    def configure(self, adata: AnnData, request: Request, overrides: Sequence[str]) -> FinetuneConfig:
        """Return the settings of the training runs, with the user's overrides."""
        return load_finetune("finetune", overrides)

    def resolve(self, parent: SavedModel, data: UserData, request: Request) -> Request:
        """Return the request with what parent and data decide, once for all parts of them."""
        return request

    def understood(self, adata: AnnData, request: Request) -> list[str]:
        """Say how the columns of the task are understood, a sentence each."""
        return []

    def hold_out(self, data: UserData, request: Request, seed: int) -> tuple[UserData, UserData | None]:
        """Return the cells to train on, and those that are kept from training to score predictions on, if any."""
        return data, None

    @abc.abstractmethod
    def prepare(self, grown: SavedModel, adata: AnnData, request: Request) -> Prepared:
        """Return what the training needs beside the cells, read and checked before anything is trained."""

    def told(self, grown: SavedModel, cells: UserCells, request: Request) -> dict[str, tuple[ColumnInfo, NDArray[Any]]]:
        """Return columns that the task's network is told beside those of the parent: what each is, and its codes or
        numbers ``[N]``.
        """
        return {}

    def require_scorable(self, grown: SavedModel, cells: UserCells, kept_back: UserData, request: Request) -> None:
        """Raise UserError if what is kept back cannot be scored after training; ``cells`` are those to train on."""

    @abc.abstractmethod
    def train(self, job: Job, prepared: Prepared) -> tuple[Module, About]:
        """Train the task's network; return the module to save, and what the model directory says of it."""

    def score(
        self, model: AnnDataModel, cells: UserCells, kept_back: UserCells, request: Request, say: Say
    ) -> PerturbationScores | None:
        """Return scores of predictions of the cells that were kept back; None if the task has none."""
        return None
