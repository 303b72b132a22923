"""``bgen finetune``: a trained model, adapted to the user's cells; the result is again a model directory.

The autoencoder is adapted first (to new genes, new batches, another tissue), then what the task needs is trained on it:
the flow (``generate``), a classifier (``annotate``), the flow from control to perturbed cells (``perturb``), the flow
over the user's time course (``time``). Modes:
``full`` trains all weights; ``lora`` low-rank changes of the linear layers, and what is new; ``head`` leaves the
autoencoder as it is (but for the rows of new batches and genes) and trains the task's last layers. A network that the
parent does not have (a classifier, a flow from control cells, a first flow over time) is new and trained whole.

Under a launcher every rank reads the data and trains its share of each batch; rank 0 speaks, scores and writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from torch import nn

from bgen.config.load import load_finetune
from bgen.data.cells_in_memory import MemoryCells
from bgen.evaluate.protocols.perturbation import PerturbationScores
from bgen.evaluate.reports.perturbation import write_perturbation_report
from bgen.genes.network import read_network
from bgen.hub.about import About, Finetuning, HeldOutScores, Parent
from bgen.hub.directory import Module, SavedModel, count_combinations, load_directory, save_model
from bgen.models.generators.latent_flow import LatentFlow
from bgen.progress import Say
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.finetune.annotator import _train_annotator
from bgen.tasks.finetune.autoencoder import _adapt_vae
from bgen.tasks.finetune.course import _train_course, about_course, course_config, read_course
from bgen.tasks.finetune.flow import _train_flow
from bgen.tasks.finetune.grow import grow, known_columns, widen_library
from bgen.tasks.finetune.perturbation import _train_perturbation
from bgen.tasks.finetune.request import WATCHED, Request, check_columns, require_possible
from bgen.tasks.finetune.runs import Runs, request_fingerprint, require_new_run, run_config
from bgen.tasks.perturb.held_out import score_held_out, split_screen
from bgen.tasks.user_cells import require_cells
from bgen.train.run import MODEL
from bgen.train.stages.in_memory import split_watched
from bgen.train.trainer import check
from bgen.version import __version__


@dataclass(frozen=True)
class Tuned:
    """The model that rank 0 wrote, and (there) its scores on what was held out, if anything was."""

    model: SavedModel
    scores: PerturbationScores | None


def finetune(
    folder: Path,
    adata: AnnData,
    out: Path,
    request: Request,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    say: Say = print,
) -> Tuned:
    """Fine-tune a model directory on cells and write ``out/model``.

    Parameters
    ----------
    folder
        The parent: any model directory; ``generate`` needs a flow.
    out
        New folder for the runs and the model.
    overrides
        ``section.key=value`` for the configuration "finetune", or "finetune/course" for a course over time.
    resume
        Go on with what ``out`` holds, from the newest whole checkpoint; start if there is nothing yet.
    say
        Told on rank 0 what is matched, new and trained.

    Raises
    ------
    UserError
        If data and model do not fit, a column is missing, ``out`` is not empty (without ``resume``), or was made from
        another parent, other cells or another request (with it).
    Interrupted
        After a signal, with a checkpoint saved.
    """
    if not resume:
        require_new_run(out)
    require_cells(adata)
    parent = load_directory(folder)
    require_possible(parent, adata, request)
    labels = check_columns(adata, request)
    course = read_course(adata, request.time, list(request.system)) if request.task == "time" else None
    base = course_config(course, overrides) if course is not None else load_finetune("finetune", overrides)
    base = base.model_copy(update={"parent": folder})
    world = check(base)
    if not world.is_main:
        say = _say_nothing
    torch.manual_seed(base.seed)  # new rows
    adata = adata.copy()
    kept_back: AnnData | None = None
    if request.hold_out and request.columns is not None:
        adata, kept_back = split_screen(adata, request.columns, request.hold_out, base.seed)
        labels = check_columns(adata, request)
    grown = grow(parent, adata, add_genes=request.add_genes, floor=request.floor, layer=request.layer, say=say)
    network = None if request.network is None else read_network(request.network, grown.genes)
    model = AnnDataModel(grown)
    cells = MemoryCells(model.counts(adata, request.layer), known_columns(grown, adata))
    widen_library(grown.vae, cells)
    runs = Runs(resume, request_fingerprint(parent, adata, cells, request), say)
    watched = split_watched(np.arange(len(cells), dtype=np.int64), WATCHED, base.seed)
    _adapt_vae(grown, parent, cells, watched, run_config(base, "vae", out / "vae"), request.mode, runs)
    torch.manual_seed(base.seed)  # new networks again: after a resume as in the run that it goes on with
    done: Module
    about = _about(parent, request, adata, out)
    if request.task == "generate":
        done = _train_flow(grown, cells, watched, run_config(base, "flow", out / "flow"), request.mode, runs)
    elif request.task == "annotate":
        settings = run_config(base, "vae", out / "annotator")
        done, annotation = _train_annotator(model, labels, cells, settings, request, runs)
        about = about.model_copy(update={"annotation": annotation})
    elif course is not None:
        done, shape = _train_course(grown, cells, course, run_config(base, "flow", out / "flow"), request.mode, runs)
        about = about_course(about, course, shape, adata)
    else:
        assert request.columns is not None, "checked at the start"
        settings = run_config(base, "perturb", out / "perturbation")
        done, perturbation = _train_perturbation(model, adata, settings, request, network, runs)
        about = about.model_copy(update={"perturbation": perturbation, "control": request.columns.control})
    used = list(dict.fromkeys([*_conditions(done), *grown.vae.covariates]))
    made = replace(
        grown,
        module=done,
        columns={name: grown.columns[name] for name in used},
        combinations=count_combinations({name: cells.obs[name] for name in used}),
        about=about,
        metrics=None,
    )
    scores: PerturbationScores | None = None
    if not world.is_main:  # scoring may take longer than ranks wait for each other, so nothing waits for it
        return Tuned(made, scores)
    if kept_back is not None and request.columns is not None:
        say("Scoring on what was held out ...")
        scores = score_held_out(AnnDataModel(made), adata, kept_back, request.columns, layer=request.layer)
        assert about.perturbation is not None, "only perturbations are held out"
        found = HeldOutScores.model_validate(scores.as_json())
        perturbation = about.perturbation.model_copy(update={"held_out": found})
        made.about = about.model_copy(update={"perturbation": perturbation})
        facts = {"parent": parent.about.name, "cells trained on": adata.n_obs, "bgen": __version__}
        write_perturbation_report(out / "report.html", scores, provenance=facts)
    if (out / MODEL).exists():  # of fewer steps: the run was resumed
        shutil.rmtree(out / MODEL)
    save_model(made, out / MODEL)
    return Tuned(made, scores)


def _conditions(module: nn.Module) -> list[str]:
    return module.conditions.names if isinstance(module, LatentFlow) else []


def _say_nothing(_: str) -> None:
    """What ranks other than the first say."""


def _about(parent: SavedModel, request: Request, adata: AnnData, out: Path) -> About:
    """Return what every fine-tuned model says of itself: what its parent knows of cells, and where it comes from."""
    theirs = parent.about
    return About(
        name=out.resolve().name,
        organism=theirs.organism,
        units=theirs.units,
        roles=theirs.roles,
        control=theirs.control,
        sources=[f"{adata.n_obs:,} cells of the user"],
        cells=adata.n_obs,
        finetuning=Finetuning(
            task=request.task,
            mode=request.mode,
            parent=Parent(name=theirs.name, fingerprint=parent.fingerprint()),
        ),
    )
