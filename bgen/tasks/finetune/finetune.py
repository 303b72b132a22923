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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import nn

from bgen import __version__
from bgen.config.data import TrajectoriesConfig
from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.data.cells_in_memory import MemoryCells
from bgen.distributed import world as ranks
from bgen.evaluate.protocols.perturbation import PerturbationScores
from bgen.evaluate.reports.perturbation import write_perturbation_report
from bgen.genes.network import Network, read_network
from bgen.hub.directory import Module, SavedModel, count_combinations, load_directory, save_model
from bgen.models.annotator import LABEL, Annotator
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.generators.perturbation_flow import PerturbationFlow
from bgen.nn.lora import add_lora, merge_lora
from bgen.progress import Say
from bgen.tasks.anndata_model import Model
from bgen.tasks.finetune.course import (
    Course,
    course_facts,
    course_shape,
    new_course_flow,
    read_course,
    whole_trajectories,
)
from bgen.tasks.finetune.grow import grow, known_columns, widen_library
from bgen.tasks.finetune.request import RANK, Mode, Request, check_columns, require_possible
from bgen.tasks.finetune.runs import Runs, request_fingerprint, require_new_run, run_config
from bgen.tasks.perturb.effect_scale import fit_scale
from bgen.tasks.perturb.effects import Scale, fit_effects
from bgen.tasks.perturb.held_out import score_held_out, split_screen
from bgen.tasks.perturb.screen import gene_rows, read_screen, require_plain_counts
from bgen.tasks.time.trajectories import trained_over_time
from bgen.tasks.user_cells import require_cells
from bgen.train.run import MODEL
from bgen.train.stages.course_in_memory import CourseStage
from bgen.train.stages.in_memory import MemoryStage, held_out
from bgen.train.stages.perturbation_pairs import PairStage
from bgen.train.trainer import check

WATCHED = 0.15
"""Share of the cells that early stopping watches."""


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
        ``section.key=value`` for the configuration "finetune".
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
    base = load_config("finetune", [f"data.store={folder}", *overrides])
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
    model = Model(grown)
    cells = MemoryCells(model.counts(adata, request.layer), known_columns(grown, adata))
    widen_library(grown.vae, cells)
    runs = Runs(resume, request_fingerprint(parent, adata, cells, request), say)
    watched = held_out(np.arange(len(cells), dtype=np.int64), WATCHED, base.seed)
    _adapt_vae(grown, parent, cells, watched, run_config(base, "vae", out / "vae"), request.mode, runs)
    torch.manual_seed(base.seed)  # new networks again: after a resume as in the run that it goes on with
    done: Module
    facts: dict[str, Any] = {}
    if request.task == "generate":
        done = _train_flow(grown, cells, watched, run_config(base, "flow", out / "flow"), request.mode, runs)
    elif request.task == "annotate":
        done, facts = _train_annotator(model, labels, cells, run_config(base, "vae", out / "annotator"), request, runs)
    elif course is not None:
        done, facts = _train_course(
            grown, adata, cells, course, run_config(base, "flow", out / "flow"), request.mode, runs
        )
    else:
        done, facts = _train_perturbation(
            model, adata, run_config(base, "perturb", out / "perturbation"), request, network, runs
        )
    used = list(dict.fromkeys([*_conditions(done), *grown.vae.covariates]))
    made = replace(
        grown,
        module=done,
        columns={name: grown.columns[name] for name in used},
        combinations=count_combinations({name: cells.obs[name] for name in used}),
        about=_about(parent, request, adata, out, facts),
        metrics=None,
    )
    scores: PerturbationScores | None = None
    if not world.is_main:  # scoring may take longer than ranks wait for each other, so nothing waits for it
        return Tuned(made, scores)
    if kept_back is not None and request.columns is not None:
        say("Scoring on what was held out ...")
        scores = score_held_out(Model(made), adata, kept_back, request.columns, layer=request.layer)
        made.about["held_out"] = scores.as_json()
        facts = {"parent": made.about["parent"]["name"], "cells trained on": adata.n_obs, "bgen": __version__}
        write_perturbation_report(out / "report.html", scores, provenance=facts)
    if (out / MODEL).exists():  # of fewer steps: the run was resumed
        shutil.rmtree(out / MODEL)
    save_model(made, out / MODEL)
    return Tuned(made, scores)


def _adapt_vae(
    grown: SavedModel,
    parent: SavedModel,
    cells: MemoryCells,
    watched: tuple[NDArray[np.int64], NDArray[np.int64]],
    config: Config,
    mode: Mode,
    runs: Runs,
) -> None:
    """Train the autoencoder on the data; in mode head only if it has new rows, and then only those tables."""
    vae = grown.vae
    is_larger = vae.n_genes > parent.vae.n_genes or vae.covariates != parent.vae.covariates
    if mode == "head" and not is_larger:
        return
    vae.requires_grad_(True)
    if mode == "lora":
        add_lora(vae, RANK)
    if mode != "full":
        tables = ["covariates.", "decoder.logits.bias", "scaled_log_theta"]
        if vae.n_genes > parent.vae.n_genes:
            tables += ["encoder.weight", "decoder.logits."]
        for name, parameter in vae.named_parameters():
            in_tables = any(part in name for part in tables)
            parameter.requires_grad_(in_tables or "parametrizations.weight.0" in name)
    # Whatever is built on the parent's latents was whitened by its statistics, so they stay.
    runs.say(f"Adapting the autoencoder ({_trained(vae):,} parameters) ...")
    stage = MemoryStage(config, vae, cells, *watched, ranks.current(), runs.fingerprint(grown), "nll")
    result = runs.fit(config, stage)
    runs.say(f"{result.step} steps, best held-out {stage.monitor} {result.best:.4g}.")
    merge_lora(vae)
    vae.requires_grad_(False).eval()


def _train_flow(
    grown: SavedModel,
    cells: MemoryCells,
    watched: tuple[NDArray[np.int64], NDArray[np.int64]],
    config: Config,
    mode: Mode,
    runs: Runs,
) -> LatentFlow:
    flow = grown.module
    assert isinstance(flow, LatentFlow), "checked at the start"
    _choose_trained(flow, mode)
    runs.fit(config, MemoryStage(config, flow, cells, *watched, ranks.current(), runs.fingerprint(grown)))
    merge_lora(flow.backbone)
    return flow


def _train_course(
    grown: SavedModel,
    adata: AnnData,
    cells: MemoryCells,
    course: Course,
    config: Config,
    mode: Mode,
    runs: Runs,
) -> tuple[LatentFlow, dict[str, Any]]:
    """Train the flow over time: the parent's, if it has one of the same column, else a new one."""
    world = ranks.current()
    if trained_over_time(grown) and grown.about["roles"].get("time") == course.column:
        assert isinstance(grown.module, LatentFlow), "only flows are trained over time"
        flow = grown.module
        _choose_trained(flow, mode)
        shape = TrajectoriesConfig.model_validate({**grown.about["trajectories"], "system": course.system})
    else:
        runs.say("The model has no flow over this time: a new one is trained on the autoencoder.")
        flow = new_course_flow(grown.vae, course)
        shape = course_shape(course, config.train.global_batch)
    stage = CourseStage(
        config.model_copy(update={"train": whole_trajectories(config.train, shape, world.size)}),
        flow,
        cells,
        shape,
        course.code,
        course.time,
        *course.split(WATCHED, config.seed),
        world,
        runs.fingerprint(grown),
    )
    runs.fit(stage.config, stage)
    merge_lora(flow.backbone)
    return flow, course_facts(course, shape, adata, grown.about.get("roles", {}))


def _choose_trained(flow: LatentFlow, mode: Mode) -> None:
    """Choose which of the flow's parameters are trained; lora: give it its low-rank changes."""
    flow.conditions.requires_grad_(True)
    flow.backbone.requires_grad_(mode == "full")
    if mode == "lora":
        add_lora(flow.backbone, RANK)
    elif mode == "head":
        flow.backbone.head.requires_grad_(True)


def _train_annotator(
    model: Model, given: NDArray[np.str_], cells: MemoryCells, config: Config, request: Request, runs: Runs
) -> tuple[Annotator, dict[str, Any]]:
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
    train, valid = held_out(np.flatnonzero(codes >= 0), WATCHED, config.seed)
    facts = runs.fingerprint(model.saved)
    runs.fit(config, MemoryStage(config, annotator, labelled, train, valid, ranks.current(), facts))
    merge_lora(annotator.vae.encoder)
    annotator.requires_grad_(False)
    return annotator, {"labels": names.tolist(), "label": request.label}


def _train_perturbation(
    model: Model, adata: AnnData, config: Config, request: Request, network: Network | None, runs: Runs
) -> tuple[PerturbationFlow, dict[str, Any]]:
    assert request.columns is not None, "checked at the start"
    vae = model.saved.vae
    require_plain_counts(vae)
    data = read_screen(model, adata, request.columns, request.layer)
    rows = gene_rows(data.cells.counts[data.screen.label < 0], config.perturb.gene_components)
    regulated: NDArray[np.float32] | None = None
    if network is not None:
        runs.say(network.sentence(data.targets))
        regulator_rows, regulated = network.factors(config.perturb.gene_components**0.5)
        rows = np.concatenate([rows, regulator_rows], axis=1)
    effects = fit_effects(data, data.labels)
    flow = PerturbationFlow(
        config.perturb,
        vae,
        len(data.names),
        torch.from_numpy(rows),
        data.dose_scale,
        torch.from_numpy(effects.values),
        None if regulated is None else torch.from_numpy(regulated),
    )
    train, valid = held_out(np.flatnonzero(data.screen.label >= 0), 0.1, config.seed)
    stage = PairStage(
        config, flow, data.cells, data.screen, train, valid, ranks.current(), runs.fingerprint(model.saved)
    )
    runs.fit(config, stage)
    scale = Scale()
    if config.perturb.scale:
        scale = ranks.from_main(fit_scale(flow, data, config.seed) if ranks.current().rank == 0 else scale)
    doses = [None if np.isnan(dose) else float(dose) for dose in effects.doses]
    facts: dict[str, Any] = {
        "perturbations": data.names,
        "control": request.columns.control,
        "strata": list(request.columns.strata),
        "effects": [{"set": list(names), "dose": dose} for names, dose in zip(effects.sets, doses, strict=True)],
        "effect_scale": asdict(scale),
    }
    if network is not None and regulated is not None:
        facts["network"] = {
            "components": len(regulated),
            "edges": network.weights.nnz,
            "edges_in_file": network.edges_in_file,
        }
    return flow, facts


def _conditions(module: nn.Module) -> list[str]:
    return module.conditions.names if isinstance(module, LatentFlow) else []


def _say_nothing(_: str) -> None:
    """What ranks other than the first say."""


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _about(parent: SavedModel, request: Request, adata: AnnData, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: parent.about[key] for key in ("organism", "units", "control", "roles") if key in parent.about},
        "name": out.resolve().name,
        "sources": [f"{adata.n_obs:,} cells of the user"],
        "cells": adata.n_obs,
        "task": request.task,
        "mode": request.mode,
        "parent": {"name": parent.about.get("name", "a bgen model"), "fingerprint": parent.fingerprint()},
        **facts,
    }
