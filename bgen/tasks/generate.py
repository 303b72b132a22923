"""``bgen generate``: new cells as counts, under any combination of conditions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from bgen.config.flow import SampleConfig
from bgen.errors import MOST_CELLS, MOST_COUNTS, MOST_SEEDS, UserError, nearest, require_number
from bgen.hub.directory import ColumnInfo, SavedModel
from bgen.models.generators.latent_flow import LatentFlow
from bgen.names import index_name, keys
from bgen.order.keys import hash_keys
from bgen.progress import Progress
from bgen.tasks.batches import Batches, filled_up, on_cpu
from bgen.version import __version__
from data_tools.check.quantities import read_quantities


@dataclass(frozen=True)
class Ask:
    """What cells somebody asks for; see :func:`generate_cells`."""

    n: int
    where: Mapping[str, Any]
    library_size: float | None = None
    seed: int = 0


def generate_cells(
    model: SavedModel,
    n: int,
    *,
    where: Mapping[str, Any],
    library_size: float | None = None,
    settings: SampleConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> AnnData:
    """Generate cells.

    What ``where`` does not fix is drawn, together, from the combinations of the training cells that agree with it; if
    none does, the rest is drawn from all of them, and ``uns['bgen']['unseen']`` says so.

    Parameters
    ----------
    n
        Number of cells.
    where
        Column or role to the value asked for.
    library_size
        Expected total counts of every cell; None: generated with the state of the cell.
    settings
        Solver, steps, guidance.
    seed
        The same seed gives the same cells.

    Returns
    -------
    AnnData
        Non-negative integer counts (CSR float32) in X; the model's genes in its order; conditions in obs; provenance in
        ``uns['bgen']``.

    Raises
    ------
    UserError
        If the model is no flow, or a condition or value is unknown to it.
    """
    [adata] = generate_together(model, [Ask(n, where, library_size, seed)], settings, progress)
    return adata


def generate_together(
    model: SavedModel, asks: Sequence[Ask], settings: SampleConfig, progress: Progress | None = None
) -> list[AnnData]:
    """Generate what several ask for in one pass: each the same cells as alone, since noise is a function of its seed.

    All of them fix the library size, or none; with solver "adaptive", whose steps all cells share, there is one.

    Raises
    ------
    UserError
        As :func:`generate_cells`, for the first of whom it is true.
    """
    assert len({ask.library_size is None for ask in asks}) == 1
    assert len(asks) == 1 or settings.solver != "adaptive"
    for ask in asks:
        require_amounts(ask.n, ask.library_size, ask.seed)
    flow = model.module
    if not isinstance(flow, LatentFlow):
        kind = "VAE" if model.kind == "vae" else f"{model.kind} model"
        raise UserError(
            f"This model is a {kind}: it embeds cells. To generate cells, train a flow on it (stage: flow)."
        )
    if flow.conditions.set_names and flow.config.patterns.noise == 0:
        raise UserError(
            "This model was trained to carry control cells to perturbed ones, not to make cells from noise: use `bgen"
            " perturb`. (flow.patterns.noise was 0.)"
        )
    drawn = [draw_rows(model.combinations, asked_codes(model, flow, ask.where), ask.n, ask.seed) for ask in asks]
    keys = torch.cat([torch.from_numpy(hash_keys(ask.seed, np.arange(ask.n)).view(np.int64)) for ask in asks])
    values = {name: torch.from_numpy(np.concatenate([rows[name] for rows, _ in drawn])) for name in drawn[0][0]}
    fixed = None
    if asks[0].library_size is not None:
        fixed = torch.cat([torch.full((ask.n,), float(np.log(ask.library_size or 1.0))) for ask in asks])

    def some(start: int, stop: int) -> sp.csr_matrix:
        part = slice(start, stop)
        sizes = None if fixed is None else fixed[part]
        return _counts(model, flow, {k: v[part] for k, v in values.items()}, keys[part], settings, sizes)

    parts: list[sp.csr_matrix] = []
    done, total, at_once = 0, len(keys), on_cpu(flow.vae.n_genes)
    together = at_once if settings.solver == "adaptive" else None  # its steps are those of all cells beside
    for part in counts_in_batches(flow).over(total, some, together=together):
        parts.append(part)
        done += part.shape[0]
        if progress:
            progress("generating", done, total)
    counts, made, first, known = sp.vstack(parts, format="csr"), [], 0, model.fingerprint()
    for ask, (rows, unseen) in zip(asks, drawn, strict=True):
        obs = pd.DataFrame(index=pd.Index([f"generated_{i}" for i in range(ask.n)], name=index_name("cell", rows)))
        for name, column in rows.items():
            obs[name] = readable(model.columns[name], column)
        adata = AnnData(counts[first : first + ask.n], obs=obs, var=model.genes.set_index("id").rename_axis("gene"))
        told = provenance(model, settings, ask.seed, ask.where, ask.library_size, known)
        adata.uns["bgen"] = {**told, "unseen": unseen}
        made.append(adata)
        first += ask.n
    return made


def read_moments(times: object) -> NDArray[np.float64]:
    """Return distinct time points, ascending.

    Raises
    ------
    UserError
        If there is none, or one is no number.
    """
    try:
        moments = np.unique(np.asarray(times, dtype=np.float64).reshape(-1))
    except (TypeError, ValueError):
        moments = np.array([np.nan])
    if not len(moments) or not np.isfinite(moments).all():
        raise UserError(f"Time points are one or several numbers, not {times!r}.")
    return moments


def require_amounts(n: int | None, library_size: float | None, seed: int) -> None:
    """Raise UserError for a number of cells, a library size or a seed that cannot be meant."""
    require_number("n", n, 1, MOST_CELLS, whole=True)
    require_number("library_size", library_size, 1, MOST_COUNTS)
    require_number("seed", seed, 0, MOST_SEEDS, whole=True)


def provenance(
    model: SavedModel,
    settings: SampleConfig,
    seed: int,
    where: Mapping[str, Any],
    library_size: float | None,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Return what generated cells say of themselves in ``uns['bgen']``; ``fingerprint``: the model's, if known."""
    return {
        "what": "cells generated by a model: raw integer counts, not measurements",
        "model": fingerprint or model.fingerprint(),
        "version": __version__,
        "seed": seed,
        "where": {key: str(where[name]) for name, key in keys(where).items()},
        "library_size": "generated" if library_size is None else float(library_size),
        "solver": settings.solver,
        "steps": settings.steps,
        "noise": settings.noise,
        "guidance": settings.guidance,
        "guidance_of": {key: settings.guidance_of[name] for name, key in keys(settings.guidance_of).items()},
        "guidance_interval": list(settings.guidance_interval),
        "precision": model.precision,
        "organism": model.about.organism,
    }


@torch.no_grad()
def _counts(
    model: SavedModel,
    flow: LatentFlow,
    values: Mapping[str, Tensor],
    keys: Tensor,
    settings: SampleConfig,
    log_library: Tensor | None,
) -> sp.csr_matrix:
    """Generate a batch of cells ``[n]``; they are the same in any batch."""
    n = len(keys)
    filled = torch.from_numpy(filled_up(0, n))
    values, keys = {name: column[filled] for name, column in values.items()}, keys[filled]
    fixed = None if log_library is None else log_library[filled]
    conditions = {name: values[name] for name in flow.conditions.names}
    with model.computing():
        latents = flow.sample(conditions, len(keys), keys, settings, fixed)
    return decode_counts(flow, latents, values, keys, fixed)[:n]


def counts_in_batches(flow: LatentFlow) -> Batches:
    """Return what draws counts, a batch of cells at a time."""
    genes = flow.vae.n_genes
    return Batches(flow.vae.device, on_cpu(genes), dense=16 * genes)  # int32, float32, and sparse


@torch.no_grad()
def decode_counts(
    flow: LatentFlow, whitened: Tensor, values: Mapping[str, Tensor], keys: Tensor, log_library: Tensor | None
) -> sp.csr_matrix:
    """Draw counts ``[n, G]`` for whitened latents ``[n, D + 1]``.

    ``values`` hold the covariates' codes ``[n]`` by column; ``log_library [n]`` fixes the size, otherwise the generated
    one is taken. All may lie on the CPU.
    """
    device = flow.vae.device
    whitened, keys = whitened.to(device), keys.to(device)
    told = {name: values[name].to(device) for name in flow.vae.covariates if name in values}
    z, generated = flow.vae.unwhiten(whitened)
    library = (generated if log_library is None else log_library.to(device)).clamp(max=math.log(MOST_COUNTS)).exp()
    likelihood = flow.vae.decode(z, library, told)
    if not np.isfinite(likelihood.mean.sum().cpu().numpy()):
        raise UserError(
            "The model gives counts that are not finite: its weights or the settings of generation are off."
        )
    return sp.csr_matrix(likelihood.sample(keys).cpu().numpy().astype(np.float32))


def sample_settings(
    defaults: SampleConfig,
    *,
    guidance: float | None = None,
    guidance_of: Mapping[str, float] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    steps: int | None = None,
    solver: str | None = None,
    noise: float | None = None,
) -> SampleConfig:
    """Return the defaults with what was given instead.

    Raises
    ------
    UserError
        If a value is not allowed.
    """
    given: dict[str, Any] = {"guidance": guidance, "guidance_interval": guidance_interval}
    given |= {"guidance_of": guidance_of, "steps": steps, "solver": solver, "noise": noise}
    changed = {name: value for name, value in given.items() if value is not None}
    try:
        return SampleConfig.model_validate({**defaults.model_dump(), **changed})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UserError(first["msg"].removeprefix("Value error, ")) from None
        raise UserError(f"{first['loc'][0]}: {first['msg']} (it is {first['input']!r})") from None


def asked_codes(model: SavedModel, flow: LatentFlow, where: Mapping[str, Any]) -> dict[str, float]:
    """Return column to code or number, of what was asked for; UserError for what the model does not know."""
    asked: dict[str, float] = {}
    if not isinstance(where, Mapping):
        raise UserError(f"Conditions are a column or role with its value, such as {{'cell_type': 'B'}}, not {where!r}.")
    for given, value in where.items():
        name = model.column_name(given)
        if name not in flow.conditions.names and name not in flow.vae.covariates:
            raise UserError(f"The model has no condition '{given}'.{nearest(given, flow.conditions.names)}")
        info = model.columns[name]
        if info.kind == "category":
            if str(value) not in info.categories:
                raise UserError(f"'{given}' has no value '{value}'.{nearest(str(value), info.categories)}")
            asked[name] = info.categories.index(str(value))
        else:
            asked[name] = asked_number(model, given, value)
            _require_trained(model, name, given, asked[name])
    return asked


def asked_number(model: SavedModel, given: str, value: object) -> float:
    """Return the number that is asked for of the column or role ``given``: a time or dose may be text with a unit.

    Raises
    ------
    UserError
        If it is none, or not finite.
    """
    role = model.columns[model.column_name(given)].role
    number = np.nan
    if isinstance(value, str) and role in ("time", "dose"):
        unit = model.about.units.get(role)
        number = float(read_quantities(pd.Series([value]), "time" if role == "time" else "dose", unit).numbers[0])
    else:
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)  # type: ignore[arg-type]
    if not np.isfinite(number):
        raise UserError(f"'{given}' is a number; '{value}' is not.")
    return number


def _require_trained(model: SavedModel, name: str, given: str, number: float) -> None:
    """Raise UserError for a number outside those of the training cells, of which the model has learned nothing."""
    if name not in model.combinations:
        return
    there = model.combinations[name].to_numpy(float)
    there = there[np.isfinite(there)]
    if not len(there):
        return
    low, high = float(there.min()), float(there.max())
    slack = 1e-6 * max(abs(low), abs(high), 1.0)
    if not low - slack <= number <= high + slack:
        unit = model.about.units.get(model.columns[name].role, "")
        raise UserError(
            f"{given} {number:g} lies outside those of the training cells, {low:g} to {high:g}"
            f"{f' {unit}' if unit else ''}: the model has not learned anything about it. Ask for one within."
        )


def draw_rows(
    combinations: pd.DataFrame, asked: Mapping[str, float], n: int, seed: int
) -> tuple[dict[str, NDArray[Any]], bool]:
    """Draw a row of conditions for each cell: columns ``[n]``; also whether no training cell had what was asked for.

    Systematic sampling: each cell's row has the distribution of the training cells, and the number of cells with a row
    differs from what is expected by less than one.
    """
    agree = np.ones(len(combinations), bool)
    for name, value in asked.items():
        agree &= np.isclose(combinations[name].to_numpy(float), value)
    unseen = not agree.any()
    table = combinations if unseen else combinations[agree]
    weights = table["cells"].to_numpy(float)
    rng = np.random.default_rng(seed)
    heights = (rng.random() + np.arange(n)) / n * weights.sum()
    picked = rng.permutation(np.searchsorted(weights.cumsum(), heights, side="right").clip(max=len(table) - 1))
    rows: dict[str, NDArray[Any]] = {}
    for name in combinations.columns.drop("cells"):
        column = table[name].to_numpy()[picked]
        if name in asked:
            column = np.full(n, asked[name])
        integer = combinations[name].dtype.kind in "iu"
        rows[str(name)] = column.astype(np.int64 if integer else np.float32)
    return rows, unseen


def readable(info: ColumnInfo, column: NDArray[Any]) -> Any:
    """Return codes as categories, numbers as they are."""
    if info.kind == "category":
        return pd.Categorical.from_codes(column.astype(np.int64), pd.Index(info.categories))
    return column
