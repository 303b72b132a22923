"""A hybrid flow on a time course of counts: the whole job of a user, without one time point.

Variable genes are chosen, the store is built, VAE and flow are trained on the other time points; then the missing one
is interpolated (or forecast) and scored by :meth:`bgen.tasks.load.Model.predict_times`, as ``bgen
interpolate`` and ``bgen forecast`` do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData

from bgen.bench.quality.time_latents import Recipe
from bgen.bench.runs import store_of, train_whole
from bgen.evaluate.metrics.counts import variable_genes
from bgen.evaluate.protocols.time_point import TimeScores
from bgen.tasks.load import Model, load_model
from bgen.tasks.user_cells import read_input

GENES = 2000
"""Variable genes that are kept, chosen on the time points that the model may see."""

VAE_STEPS, BATCH = 1000, 128


def score_missing_time(
    cells: AnnData,
    time: float,
    folder: Path,
    recipe: Recipe,
    *,
    system: Sequence[str],
    seed: int,
    forecast: bool = False,
) -> TimeScores:
    """Train without the cells of one time, generate that time from the others, and score it.

    Parameters
    ----------
    cells
        Counts in X; obs: ``time`` (a number for every time point), ``batch``, and the columns of ``system``.
    folder
        New folder for store and runs.
    forecast
        Show the trained model only the time points before (training sees all the others).
    """
    model, cells = train_without(cells, time, folder, recipe, system=system, seed=seed)
    _, scores = model.predict_times(cells, time, forecast=forecast, seed=seed)
    return scores[time]


def train_without(
    cells: AnnData, time: float, folder: Path, recipe: Recipe, *, system: Sequence[str], seed: int
) -> tuple[Model, AnnData]:
    """Return a model of the other time points, and all cells with the genes that were chosen on those."""
    seen = cells[cells.obs["time"] != time]
    genes = np.sort(variable_genes(seen.X, min(GENES, cells.n_vars)))
    seen, cells = seen[:, genes].copy(), cells[:, genes].copy()
    store = store_of(seen, folder / "data", seed)
    common = [f"seed={seed}", f"data.store={store}", "track.mlflow=false", "track.progress=false"]
    vae = [
        *common,
        f"out={folder / 'vae'}",
        "vae.covariates=[batch]",
        f"train.steps={min(VAE_STEPS, 10 * recipe.train.steps)}",
        f"train.global_batch={BATCH}",
        "train.learning_rate=2e-3",
    ]
    train_whole("vae", vae)
    shape = {**recipe.shape.model_dump(mode="json"), "system": list(system)}
    training = recipe.train.model_dump(mode="json", exclude_unset=True)
    flow_settings = recipe.flow.model_dump(mode="json", exclude={"vae"})
    flow = [
        *common,
        f"out={folder / 'flow'}",
        f"flow.vae={folder / 'vae'}",
        *(f"flow.{name}={json.dumps(value)}" for name, value in flow_settings.items()),
        f"sample={json.dumps(recipe.sample.model_dump(mode='json'))}",
        f"data.trajectories={json.dumps(shape)}",
        f"train={json.dumps(training)}",
    ]
    train_whole("trajectories", flow)
    return load_model(folder / "flow" / "model", "cpu"), cells


def read_worm(path: Path) -> tuple[AnnData, list[str]]:
    """Read C. elegans neuron lineages (Packer et al., Science 2019): time is the mean minute of each of the 8 bins."""
    cells = read_input(path)
    bins, minute = cells.obs["embryo_time_bin"].astype(str), cells.obs["embryo_time"].astype(float)
    cells.obs["time"] = minute.groupby(bins.to_numpy()).transform("mean").round(1)
    cells.uns["time_unit"] = "minutes"
    cells.obs = cells.obs[["time", "batch", "cell_type"]].copy()
    return cells, []


def read_simulated(path: Path) -> tuple[AnnData, list[str]]:
    """Read what ``bgen data simulate`` wrote: trajectories are donors."""
    cells = read_input(path)
    return cells, ["donor"]
