"""Training from Python: ``bgen.train_vae``, ``train_flow``, ``train_trajectories`` and ``train_perturbation``.

Each is a stage of ``bgen train`` with the configuration of its name. Settings are keyword arguments with the names of
the YAML files: a section with its values (``vae={"latent": 32}``), or, of the sections ``train`` and that of the stage,
a value by itself (``steps=500``, ``latent=32``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from anndata import AnnData

from bgen.api.data import store_for
from bgen.api.trained import Trained
from bgen.config.flow import FlowConfig
from bgen.config.load import load_config
from bgen.config.run import Config
from bgen.config.train import TrainConfig
from bgen.config.vae import VAEConfig
from bgen.demo import ASKED
from bgen.errors import UserError, nearest
from bgen.store.open import open_manifest
from bgen.store.store import Store
from bgen.tasks.finetune.runs import Interrupted
from bgen.train.run import train

Data: TypeAlias = AnnData | Store | str | PathLike[str]
"""AnnData in memory, a file of cells, a store, or its folder or address."""


def train_vae(
    data: Data,
    /,
    out: str | PathLike[str] = "runs/vae",
    *,
    covariates: Sequence[str] | None = None,
    config: str | PathLike[str] = "vae",
    seed: int = 0,
    resume: bool = False,
    **settings: Any,
) -> Trained:
    """Train a VAE of counts: the space that embeds and denoises cells, and in which a flow generates them.

    Parameters
    ----------
    data
        AnnData with raw counts, or a file of them, of which a store is made in ``out/store``; or a store of
        :func:`bgen.build`.
    out
        Run folder.
    covariates
        obs columns (or roles) that the decoder is told, and latents need not hold; default: the batch, if there is one.
    config
        Name of a configuration that comes with bgen, such as "demo/vae", or a YAML file.
    resume
        Go on with the run in ``out``, or start if there is none.
    settings
        Sections of the configuration, ``train={"steps": 500}``, or single values of ``train`` and ``vae``:
        ``steps=500, latent=32``.

    Raises
    ------
    UserError
        If data or settings cannot be used, naming each; or if ``out`` holds a run.
    Interrupted
        After an interrupt, with a checkpoint saved.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> cells = simulate("tiny", seed=0)
    >>> quick = {"steps": 20, "global_batch": 64, "track": {"progress": False, "mlflow": False}}
    >>> vae = bgen.train_vae(cells, "vae", latent=8, **quick)
    >>> vae.model.embed(cells).obsm["X_bgen"].shape
    (600, 8)
    """
    if covariates is not None:
        settings = _with(settings, "vae", {"covariates": list(covariates)})
    return _train(data, Path(out), config, seed, resume, settings, "vae", tell_batch=covariates is None)


def train_flow(
    data: Data,
    vae: Trained | str | PathLike[str],
    /,
    out: str | PathLike[str] = "runs/flow",
    *,
    conditions: Sequence[str] | None = None,
    config: str | PathLike[str] = "flow",
    seed: int = 0,
    resume: bool = False,
    **settings: Any,
) -> Trained:
    """Train a rectified flow in the latent space of a VAE: the model that generates cells.

    Parameters
    ----------
    data
        What the VAE was trained on, best as its ``store``; see :func:`train_vae`.
    vae
        What :func:`train_vae` gave, its run folder, or a model directory.
    conditions
        obs columns (or roles) that cells can be asked for; default: those of cell type, perturbation, time and dose
        that there are.
    out, config, seed, resume, settings
        As in :func:`train_vae`; single values are those of ``train`` and ``flow``.

    Raises
    ------
    UserError
        If data, VAE or settings cannot be used, naming each; or if ``out`` holds a run.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> quick = {"steps": 20, "global_batch": 64, "track": {"progress": False, "mlflow": False}}
    >>> vae = bgen.train_vae(simulate("tiny", seed=0), "vae", **quick)
    >>> flow = bgen.train_flow(vae.store, vae, "flow", fit_levels=False, conditions=["cell_type"], **quick)
    >>> sorted(flow.model.conditions)
    ['cell_type']
    >>> flow.model.generate(5, seed=0).shape
    (5, 120)
    """
    return _train_flow(data, vae, Path(out), conditions, config, seed, resume, settings)


def train_trajectories(
    data: Data,
    vae: Trained | str | PathLike[str],
    /,
    out: str | PathLike[str] = "runs/trajectories",
    *,
    system: Sequence[str],
    conditions: Sequence[str] | None = ("time",),
    config: str | PathLike[str] = "trajectories",
    seed: int = 0,
    resume: bool = False,
    **settings: Any,
) -> Trained:
    """Train a flow over populations in time: it generates whole courses, forecasts, and fills in missing time points.

    Parameters
    ----------
    data
        Cells with a time in obs, best as the ``store`` of the VAE's training; see :func:`train_vae`.
    vae
        What :func:`train_vae` gave, its run folder, or a model directory.
    out
        Run folder.
    system
        obs columns (or roles) that say which populations are one course, such as donor.
    conditions
        obs columns (or roles) that cells can be asked for.
    config, seed, resume, settings
        As in :func:`train_vae`; single values are those of ``train`` and ``flow``.

    Raises
    ------
    UserError
        If data, VAE or settings cannot be used, naming each; or if ``out`` holds a run.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> quick = {"steps": 5, "global_batch": 64, "track": {"progress": False, "mlflow": False}}
    >>> vae = bgen.train_vae(simulate("tiny", seed=0), "vae", **quick)
    >>> small = {"data": {"trajectories": {"times": 2, "cells": 8, "pool": 256}}, "backbone": {"name": "mlp"}}
    >>> course = bgen.train_trajectories(vae.store, vae, "course", system=["donor"], fit_levels=False, **small, **quick)
    >>> cells = course.model.generate(10, times=[0.0, 24.0], seed=0)  # of each time
    >>> cells.obs["time"].value_counts().to_dict()
    {0.0: 10, 24.0: 10}
    """
    settings = _with(settings, "data", {"trajectories": {"system": list(system)}})
    return _train_flow(data, vae, Path(out), conditions, config, seed, resume, settings)


def train_perturbation(
    data: Data,
    vae: Trained | str | PathLike[str],
    /,
    out: str | PathLike[str] = "runs/perturbation",
    *,
    system: Sequence[str],
    config: str | PathLike[str] = "perturbation",
    seed: int = 0,
    resume: bool = False,
    **settings: Any,
) -> Trained:
    """Train a flow from control cells to perturbed ones, which answers for cells and perturbations it has not seen.

    Parameters
    ----------
    data
        Cells with a perturbation in obs, best as the ``store`` of the VAE's training; see :func:`train_vae`.
    vae
        What :func:`train_vae` gave, its run folder, or a model directory.
    out
        Run folder.
    system
        obs columns (or roles) that say whose control cells go with which perturbed ones, such as cell_type.
    config, seed, resume, settings
        As in :func:`train_vae`; single values are those of ``train`` and ``flow``.

    Raises
    ------
    UserError
        If data, VAE or settings cannot be used, naming each; or if ``out`` holds a run.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> cells = simulate("tiny", seed=0)
    >>> quick = {"steps": 5, "global_batch": 64, "track": {"progress": False, "mlflow": False}}
    >>> vae = bgen.train_vae(cells, "vae", **quick)
    >>> small = {"data": {"trajectories": {"times": 2, "cells": 8, "pool": 256}}, "backbone": {"name": "mlp"}}
    >>> screen = bgen.train_perturbation(vae.store, vae, "screen", system=["donor"], fit_levels=False, **small, **quick)
    >>> label = next(label for label in cells.obs["perturbation"].unique() if label != "control")
    >>> screen.model.perturb(cells, label, n=10, seed=0).n_obs
    10
    """
    settings = _with(settings, "data", {"trajectories": {"system": list(system)}})
    return _train_flow(data, vae, Path(out), (), config, seed, resume, settings)


def _train_flow(
    data: Data,
    vae: Trained | str | PathLike[str],
    out: Path,
    conditions: Sequence[str] | None,
    config: str | PathLike[str],
    seed: int,
    resume: bool,
    settings: Mapping[str, Any],
) -> Trained:
    folder = vae.folder if isinstance(vae, Trained) else Path(vae)
    settings = _with(settings, "flow", {"vae": folder})
    if conditions is not None:
        settings = _with(settings, "flow", {"conditions": list(conditions)})
    return _train(data, out, config, seed, resume, settings, "flow", ask=conditions is None)


def _train(
    data: Data,
    out: Path,
    config: str | PathLike[str],
    seed: int,
    resume: bool,
    settings: Mapping[str, Any],
    stage: str,
    *,
    tell_batch: bool = False,
    ask: bool = False,
) -> Trained:
    given = _in_sections(settings, stage) | {"out": out, "seed": seed}
    name = str(config)
    asked = load_config(name, settings=_with(given, "data", {"store": str(out)}))  # told before a store is built
    if asked.stage != stage:
        raise UserError(f"The configuration {name} trains a {asked.stage}, not a {stage}.")
    store = store_for(data, out, progress=asked.track.progress)
    given = _with(given, "data", {"store": store})
    manifest = open_manifest(store)
    batch = manifest.roles.get("batch")
    if tell_batch and batch is not None and manifest.columns[batch].kind == "category":
        given = _with(given, "vae", {"covariates": [batch]})
    if ask:
        given = _with(given, "flow", {"conditions": [manifest.roles[role] for role in ASKED if role in manifest.roles]})
    made = load_config(name, settings=given)
    if train(made, resume=resume).interrupted:
        raise Interrupted(
            f"Training was stopped; the same call with resume=True goes on with {out}.", made.train.requeue_exit
        )
    return Trained(out, store)


def _in_sections(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return the settings with single values in the sections that have them.

    Raises
    ------
    UserError
        If one is neither a section nor a value of ``train`` or of the stage.
    """
    sections = {"train": TrainConfig, stage: VAEConfig if stage == "vae" else FlowConfig}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in Config.model_fields:
            found = _with(found, name, value)
            continue
        section = next((section for section, fields in sections.items() if name in fields.model_fields), None)
        if section is None:
            known = [*Config.model_fields, *(key for fields in sections.values() for key in fields.model_fields)]
            raise UserError(f"There is no setting '{name}'.{nearest(name, known)}")
        found = _with(found, section, {name: value})
    return found


def _with(settings: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return the settings with ``value`` under ``key``; mappings are joined, at every depth, and ``value`` wins."""
    old = settings.get(key)
    if isinstance(old, Mapping) and isinstance(value, Mapping):
        for name, inner in value.items():
            old = _with(old, name, inner)
        value = old
    return {**settings, key: value}
