"""``bgen train`` and ``bgen export``: from a configuration to a run folder, and from that to a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bgen.checkpoint.ownership import owning
from bgen.config.run import Config
from bgen.distributed import world as ranks
from bgen.distributed.patience import together
from bgen.errors import UserError
from bgen.hub.about import About, Perturbation, Training
from bgen.hub.directory import ColumnInfo, SavedModel, count_combinations, save_model
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.vae import VAE
from bgen.order.cells import Cells, pick
from bgen.order.groups import parts
from bgen.store.leakage import assert_no_leakage
from bgen.store.open import open_data
from bgen.store.store import Store
from bgen.train.stages.flow import FlowStage, mean_and_std
from bgen.train.stages.from_store import StoreStage
from bgen.train.stages.registry import make_stage, rebuild
from bgen.train.trainer import Trainer, TrainResult, check

MODEL = "model"
"""Folder of the exported model in a run folder."""

MOST_TIMES = 256
"""Times of the training cells that an exported model remembers."""


def train(config: Config, *, resume: bool = False, accept_changed_data: bool = False) -> TrainResult:
    """Train the stage that the configuration names, and export the result to ``out/model``.

    Parameters
    ----------
    config
        The configuration.
    resume
        Go on from the newest whole checkpoint, or start if there is none yet.
    accept_changed_data
        Also go on if the data are not those that the run began with.

    Raises
    ------
    UserError
        If the configuration, the store and the run folder do not fit together.
    """
    world = check(config)
    store = open_data(config.data)
    _refuse_leakage(store, world)
    stage = make_stage(config, store, world)
    with owning(config.out) as owner:
        result = Trainer(config, stage).fit(resume=resume, accept_changed_data=accept_changed_data)

        def write() -> None:
            owner.check()
            # A run that was resumed has exported a model before, after fewer steps.
            save_model(exported(config, stage, result.step), config.out / MODEL, replace=True)

        together(write if world.is_main and not result.interrupted else None)
    return result


def _refuse_leakage(store: Store, world: ranks.World) -> None:
    """Raise UserError on every rank if the main rank finds cells or groups that are in two splits."""
    problem = None
    if world.is_main:
        try:
            assert_no_leakage(store)
        except UserError as error:
            problem = str(error)
    if (problem := ranks.from_main(problem)) is not None:
        raise UserError(problem)


def _times(store: Store, cells: Cells) -> list[float]:
    """Return the distinct times of cells, ascending, in the store's unit; at most :data:`MOST_TIMES`, evenly spread."""
    column = store.manifest.roles.get("time")
    if column is None or store.manifest.columns[column].kind != "number":
        return []
    values = pick(store.column(column)[1], cells)
    times = np.unique(np.concatenate([np.unique(values[part]) for part in parts(len(values))]))
    times = times[np.isfinite(times)]
    if len(times) > MOST_TIMES:
        times = times[np.linspace(0, len(times) - 1, MOST_TIMES).round().astype(int)]
    return [float(time) for time in times]


def export(run: Path, out: Path) -> None:
    """Write the newest verified checkpoint of a run as a model directory.

    Raises
    ------
    UserError
        If ``run`` is no run folder, has no usable checkpoint, or ``out`` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is there already and not empty. Choose another --out, or remove it first.")
    config, stage, checkpoint = rebuild(run, ranks.start())
    stage.finish(stage.module)
    save_model(exported(config, stage, int(checkpoint.name.rsplit("_", 1)[-1])), out)


def _perturbation(config: Config, stage: StoreStage) -> Perturbation | None:
    """Return what the model says of perturbations, if its flow is told of them."""
    members = stage.members if isinstance(stage, FlowStage) else None
    if members is None:
        return None
    assert isinstance(stage, FlowStage)
    system = config.data.trajectories.system if config.data.trajectories else []
    return members.facts([stage.store.column_name(name) for name in system], stage.effects, stage.context_names)


def exported(config: Config, stage: StoreStage, step: int) -> SavedModel:
    """Return what a model directory holds for a trained stage."""
    store, module = stage.store, stage.module
    assert isinstance(module, VAE | LatentFlow)
    conditions = module.conditions.names if isinstance(module, LatentFlow) else []
    codec = module.vae if isinstance(module, LatentFlow) else module
    names = list(dict.fromkeys([*conditions, *codec.covariates]))
    roles = {column: role for role, column in store.manifest.roles.items() if role not in ("population", "condition")}
    cells = store.split(config.data.split)
    columns: dict[str, ColumnInfo] = {}
    values: dict[str, Any] = {}
    for name in names:
        column, everywhere = store.column(name)
        values[name] = pick(everywhere, cells)
        role = roles.get(name, name)
        if column.kind == "category":
            columns[name] = ColumnInfo(role, "category", column.categories)
        else:
            columns[name] = ColumnInfo(role, "number", [], *mean_and_std(values[name]))
    manifest = store.manifest
    return SavedModel(
        module=module,
        genes=store.genes,
        columns=columns,
        combinations=count_combinations(values),
        sample=config.sample,
        about=About(
            name=config.out.resolve().name,
            organism=manifest.organism,
            units=manifest.units,
            roles=manifest.roles,
            control=manifest.control,
            sources=[source.name for source in manifest.sources],
            cells=len(cells),
            times=_times(store, cells),
            trajectories=config.data.trajectories,
            perturbation=_perturbation(config, stage),
            training=Training(store=manifest.fingerprint, split=config.data.split, steps=step, seed=config.seed),
        ),
    )
