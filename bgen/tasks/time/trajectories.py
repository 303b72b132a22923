"""``bgen generate --times``: whole trajectories of populations, from a model that was trained on trajectories.

Axes: B trajectories, T time points, N cells per time point, D + 1 whitened latents, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from bgen.config.flow import SampleConfig
from bgen.errors import UserError
from bgen.hub.directory import SavedModel
from bgen.models.generators.latent_flow import LatentFlow, Places
from bgen.names import index_name
from bgen.order.keys import hash_keys
from bgen.progress import Progress
from bgen.tasks.batches import Batches, filled_up, on_cpu
from bgen.tasks.generate import (
    asked_codes,
    counts_in_batches,
    decode_counts,
    draw_rows,
    generate_cells,
    provenance,
    read_moments,
    readable,
    require_amounts,
)
from bgen.tasks.time.axis import TimeAxis, trained_over_time


def generate_as_trained(
    model: SavedModel,
    n: int,
    *,
    times: Sequence[float] | Literal["all"] | None = None,
    where: Mapping[str, Any],
    library_size: float | None = None,
    settings: SampleConfig,
    seed: int,
    progress: Progress | None = None,
) -> AnnData:
    """Generate cells as the model was trained: single ones, or whole trajectories.

    Trajectories if ``times`` are given ("all": those of the training cells), or if the model was trained on such: see
    :func:`generate_trajectories`, and :func:`bgen.tasks.generate.generate_cells` for single cells.
    """
    if times is None and not trained_over_time(model):
        return generate_cells(
            model, n, where=where, library_size=library_size, settings=settings, seed=seed, progress=progress
        )
    return generate_trajectories(
        model,
        n,
        times=None if times is None or times == "all" else times,
        where=where,
        library_size=library_size,
        settings=settings,
        seed=seed,
        progress=progress,
    )


def generate_trajectories(
    model: SavedModel,
    n: int,
    *,
    times: Sequence[float] | None,
    where: Mapping[str, Any],
    library_size: float | None,
    settings: SampleConfig,
    seed: int,
    progress: Progress | None,
) -> AnnData:
    """Generate whole trajectories, all time points together.

    Cells come in trajectories of as many cells per time point as in training. Columns that name a system are drawn for
    each trajectory from the training cells that agree with ``where``, covariates for each cell from those at that time
    (the nearest one that training held); other conditions are unknown unless ``where`` gives them, as they are in
    training for a population whose cells differ in them.

    Parameters
    ----------
    n
        Cells at each time point.
    times
        Time points in the model's unit, within the range of training; None: those of the training cells.

    Returns
    -------
    AnnData
        As :func:`bgen.tasks.generate.generate_cells`, time point by time point, with the time and the number of the
        ``trajectory`` in obs. Cells at the same place in two time points have nothing to do with each other.

    Raises
    ------
    UserError
        If the model was not trained on trajectories, or a condition, value or time is unknown to it.
    """
    require_amounts(n, library_size, seed)
    axis = TimeAxis.of(model)
    flow = model.module
    assert isinstance(flow, LatentFlow)
    if flow.config.patterns.noise == 0:
        raise UserError(
            "This model was trained to fill in and to forecast time points, from others that are given: use"
            " `bgen interpolate` or `bgen forecast`. (flow.patterns.noise was 0.)"
        )
    moments = axis.trained if times is None else read_moments(times)
    axis.require_known(moments)
    asked = asked_codes(model, flow, where)
    if axis.column in asked:
        raise UserError(f"'{axis.column}' is what the trajectory runs along: give time points, not a condition.")
    T, N = len(moments), axis.cells
    B = -(-n // N)
    systems, unseen = draw_rows(model.combinations, asked, B, seed)
    at_once = on_cpu(flow.vae.n_genes * T * N)

    def followed(start: int, stop: int) -> tuple[Tensor, Tensor]:
        some = np.arange(start, stop)
        time_BT = torch.from_numpy(np.tile(moments, (len(some), 1)).astype(np.float32))
        conditions = {}
        for name in flow.conditions.names:
            if name == axis.column:
                conditions[name] = time_BT
            elif name in asked or name in axis.system:
                values = systems[name][some]
                conditions[name] = torch.from_numpy(np.repeat(values[:, None], T, axis=1))
        keys = torch.from_numpy(
            hash_keys(seed, (some[:, None, None] * T + np.arange(T)[:, None]) * N + np.arange(N)).view(np.int64)
        )
        places = Places(mask=torch.ones(len(some), T, N, dtype=torch.bool), time=time_BT)
        fixed = None if library_size is None else torch.full(keys.shape, float(np.log(library_size)))
        with model.computing():
            return flow.sample_trajectories(conditions, keys, settings, places, fixed).cpu(), keys

    latents: list[Tensor] = []
    every_key: list[Tensor] = []
    batches = Batches(flow.vae.device, on_cpu(flow.vae.n_genes), unit=T * N)
    for z, keys in batches.over(B, followed, together=at_once if settings.solver == "adaptive" else None):
        latents.append(z)
        every_key.append(keys)
        if progress:
            progress("generating", min(sum(map(len, latents)) * N, n), n)
    z_BTND, keys_BTN = torch.cat(latents), torch.cat(every_key)
    parts: list[sp.csr_matrix] = []
    columns: list[dict[str, NDArray[Any]]] = []
    for t, moment in enumerate(moments):
        wanted = asked | nearest_time(model, axis, moment)
        rows = _drawn(model, wanted, [min(at_once, B - start) * N for start in range(0, B, at_once)], seed, at_once)
        for name in axis.system:
            if name in rows:
                rows[name] = np.repeat(systems[name], N)
        parts.append(decode_some(flow, z_BTND[:, t].flatten(0, 1), rows, keys_BTN[:, t].flatten(), library_size)[:n])
        columns.append({**rows, "trajectory": np.repeat(np.arange(B), N)})
        if progress:
            progress("drawing counts", t + 1, T)
    counts = sp.vstack(parts, format="csr")
    named = index_name("cell", [axis.column, *columns[0]])
    obs = pd.DataFrame(index=pd.Index([f"generated_{i}" for i in range(n * T)], name=named))
    obs[axis.column] = np.repeat(moments, n)
    for name in columns[0]:
        values = np.concatenate([column[name][:n] for column in columns])
        if name == "trajectory":
            obs[name] = values
        elif name != axis.column and (name in asked or name in axis.system or name in flow.vae.covariates):
            obs[name] = readable(model.columns[name], values)
    adata = AnnData(counts, obs=obs, var=model.genes.set_index("id").rename_axis("gene"))
    adata.uns["bgen"] = {**provenance(model, settings, seed, where, library_size), "unseen": unseen}
    if axis.unit:
        adata.uns["time_unit"] = axis.unit
    return adata


def nearest_time(model: SavedModel, axis: TimeAxis, moment: float) -> dict[str, float]:
    """Return the time of training cells that is nearest, as something to ask :func:`draw_rows` for."""
    if axis.column not in model.combinations:
        return {}
    there = model.combinations[axis.column].to_numpy(float)
    return {axis.column: float(there[np.nanargmin(np.abs(there - moment))])}


def _drawn(
    model: SavedModel, asked: Mapping[str, float], sizes: Sequence[int], seed: int, step: int
) -> dict[str, NDArray[Any]]:
    """Draw rows of conditions for parts of so many cells, each part by a seed of its own: columns ``[n]``."""
    parts = [draw_rows(model.combinations, asked, size, seed + step * i)[0] for i, size in enumerate(sizes)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def decode_some(
    flow: LatentFlow, z: Tensor, rows: Mapping[str, NDArray[Any]], keys: Tensor, library_size: float | None
) -> sp.csr_matrix:
    """Draw counts ``[n, G]`` for latents ``z [n, D + 1]``, a block of cells at a time.

    ``rows`` hold the covariates ``[n]``, unknown where absent; ``library_size`` fixes the size.
    """
    values = {name: torch.from_numpy(rows[name]) for name in flow.vae.covariates if name in rows}
    fixed = None if library_size is None else torch.full((len(z),), float(np.log(library_size)))

    def some(start: int, stop: int) -> sp.csr_matrix:
        part = torch.from_numpy(filled_up(start, stop))
        told = {name: column[part] for name, column in values.items()}
        return decode_counts(flow, z[part], told, keys[part], None if fixed is None else fixed[part])[: stop - start]

    return sp.vstack(list(counts_in_batches(flow).over(len(z), some)), format="csr")
