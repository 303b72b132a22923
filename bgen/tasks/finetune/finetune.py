"""``bgen finetune``: adapt a trained model to the user's cells; the result is again a model directory.

The autoencoder is adapted first (to new genes, new batches, another tissue), then what the task needs is trained on it:
the flow (``generate``), a classifier (``annotate``), the flow from control to perturbed cells (``perturb``), the flow
over the user's time course (``time``). Modes: ``full`` trains all weights; ``lora`` trains low-rank changes of the
linear layers, and what is new; ``head`` leaves the autoencoder as it is (except the rows of new batches and genes) and
trains the last layers of the task. A network that the parent does not have (a classifier, a flow from control cells, a
first flow over time) is new and trained whole.

Under a launcher every rank reads the data and trains its share of each batch; rank 0 speaks, scores and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bgen.data.cells_in_memory import MemoryCells
from bgen.errors import UserError
from bgen.evaluate.protocols.perturbation_scores import PerturbationScores
from bgen.evaluate.registry import PerturbationProtocol, find_protocol
from bgen.hub.about import About, Finetuning, HeldOutScores, Parent
from bgen.hub.directory import SavedModel, count_combinations, load_directory, save_model, update_about
from bgen.models.generators.latent_flow import LatentFlow
from bgen.names import shown
from bgen.progress import Say
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.columns import require_column
from bgen.tasks.finetune.autoencoder import adapt_autoencoder
from bgen.tasks.finetune.grow import grow, known_columns, tuned_genes, widen_library
from bgen.tasks.finetune.registry import task_of
from bgen.tasks.finetune.request import WATCHED, Request, require_cells_enough
from bgen.tasks.finetune.runs import Runs, request_fingerprint, require_new_run, run_config
from bgen.tasks.finetune.task import Job
from bgen.tasks.user_cells import Cells, read_user_data
from bgen.train.run import MODEL
from bgen.train.stages.in_memory import split_watched
from bgen.train.trainer import check
from bgen.version import __version__


@dataclass(frozen=True)
class Tuned:
    """The model that rank 0 wrote, and, on rank 0, its scores on held-out perturbations, if there were any."""

    model: SavedModel
    scores: PerturbationScores | None


def finetune(
    folder: Path,
    data: Cells,
    out: Path,
    request: Request,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    say: Say | None = None,
) -> Tuned:
    """Fine-tune a model directory on cells and write ``out/model``.

    Parameters
    ----------
    folder
        The parent: any model directory; ``generate`` needs a flow.
    data
        A file or folder of any format that ``bgen data check`` reads, or AnnData in memory.
    out
        New folder for the runs and the model.
    overrides
        ``section.key=value`` for the configuration "finetune", or "finetune/course" for a course over time.
    resume
        Go on with what ``out`` holds, from the newest whole checkpoint; start if there is nothing yet.
    say
        Told on rank 0 what is matched, new and trained; default: it is printed.

    Raises
    ------
    UserError
        If data and model do not fit, a column is missing, ``out`` is not empty (without ``resume``), or was made from
        another parent, other cells or another request (with it).
    Interrupted
        After a signal, with a checkpoint saved.
    """
    task = task_of(request)
    if not resume:
        require_new_run(out)
    parent, read = load_directory(folder), read_user_data(data, **request.reading)
    require_cells_enough(len(read))
    for name in request.named_columns:
        require_column(read.adata, name)
    request = task.resolve(parent, read, request)
    task.check(parent, read.adata, request)
    base = task.configure(read.adata, request, overrides).model_copy(update={"parent": folder})
    world = check(base)
    say = (say or _print) if world.is_main else _say_nothing
    for sentence in task.understood(read.adata, request):
        say(sentence)
    torch.manual_seed(base.seed)  # new rows
    read, kept_back = task.hold_out(read, request, base.seed)
    if kept_back is not None:
        task.check(parent, read.adata, request)
    cells = AnnDataModel(parent).read(read)
    for sentence in cells.matched.sentences(values=False):
        say(sentence)
    grown = grow(parent, cells, add_genes=request.add_genes, say=say)
    shares = AnnDataModel(grown).expected_shares()
    if len(grown.genes) > len(parent.genes):
        cells = read.match(grown.genes, grown.columns, shares, grown.about.units)
    else:
        cells = cells.with_columns(grown.columns, grown.about.units)
    prepared = task.prepare(grown, cells.adata, request)
    if kept_back is not None:
        task.require_scorable(grown, cells, kept_back, request)
    told = task.told(grown, cells, request)
    grown = replace(grown, columns={**grown.columns, **{name: info for name, (info, _) in told.items()}})
    columns = {**known_columns(grown, cells), **{name: values for name, (_, values) in told.items()}}
    memory = MemoryCells(cells.counts, columns)
    widen_library(grown.codec, memory)
    runs = Runs(resume, request_fingerprint(parent, cells.adata, memory, request), say)
    watched = split_watched(np.arange(len(cells), dtype=np.int64), WATCHED, base.seed)
    adapt_autoencoder(grown, parent, memory, watched, run_config(base, "vae", out / "vae"), request.mode, runs)
    torch.manual_seed(base.seed)  # new networks again: after a resume as in the run that it goes on with
    about = _about(parent, request, len(cells), out)
    done, about = task.train(Job(grown, cells, memory, watched, base, out, request, runs, about), prepared)
    if isinstance(done, LatentFlow) and done.conditions.set_names and about.perturbation is None:
        theirs = parent.about.perturbation  # what the parent knows of perturbations stays
        kept = None if theirs is None else theirs.model_copy(update={"held_out": None})
        about = about.model_copy(update={"perturbation": kept})
    if parent.about.extension is not None:
        about = about.model_copy(update={"extension": parent.about.extension})
    used = list(dict.fromkeys([*_conditions(done), *grown.codec.covariates]))
    made = replace(
        grown,
        module=done,
        genes=tuned_genes(grown.genes, cells) if request.mode == "full" else grown.genes,
        columns={name: grown.columns[name] for name in used},
        combinations=count_combinations({name: memory.obs[name] for name in used}),
        about=about,
        metrics=None,
    )
    if not world.is_main:  # scoring may take longer than ranks wait for each other, so nothing waits for it
        return Tuned(made, None)
    # Before it is scored: a score that fails loses no model. One that is there is of fewer steps: the run was resumed.
    save_model(made, out / MODEL, replace=True)
    if kept_back is None:
        return Tuned(made, None)
    say("Scoring on what was held out ...")
    try:
        held_out = kept_back.match(grown.genes, grown.columns, shares, grown.about.units)
        scores = task.score(AnnDataModel(made), cells, held_out, request, say)
    except UserError as error:
        raise UserError(f"The model is trained and saved: {out / MODEL}. Its score failed: {error}") from error
    if scores is not None:
        assert about.perturbation is not None, "only perturbations are held out"
        found = HeldOutScores.model_validate(scores.as_json())
        made.about = about.model_copy(
            update={"perturbation": about.perturbation.model_copy(update={"held_out": found})}
        )
        update_about(out / MODEL, made.about)
        facts = {"parent": parent.about.name, "cells trained on": len(cells), "bgen": __version__}
        find_protocol(PerturbationProtocol).report(out / "report.html", scores, provenance=facts)
    return Tuned(made, scores)


def _conditions(module: nn.Module) -> list[str]:
    return module.conditions.names if isinstance(module, LatentFlow) else []


def _print(text: str) -> None:
    print(shown(text))


def _say_nothing(_: str) -> None:
    """What ranks other than the first say."""


def _about(parent: SavedModel, request: Request, n_cells: int, out: Path) -> About:
    """Return what every fine-tuned model says of itself: what its parent knows of cells, and where it comes from."""
    theirs = parent.about
    return About(
        name=out.resolve().name,
        organism=theirs.organism,
        units=theirs.units,
        roles=theirs.roles,
        control=theirs.control,
        sources=[f"{n_cells:,} cells of the user"],
        cells=n_cells,
        finetuning=Finetuning(
            task=request.task,
            mode=request.mode,
            parent=Parent(name=theirs.name, fingerprint=parent.fingerprint()),
        ),
    )
