"""``bgen perturb``: what the user's own control cells would look like under a perturbation.

Axes: N cells, G genes of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from bgen.arrays import F64
from bgen.effects.context_pool import controls_of
from bgen.errors import MOST_CELLS, MOST_SEEDS, UserError, require_number
from bgen.genes.expression import TARGET_SUM
from bgen.models.generators.counterfactual import change_counts, decode_changed, mean_share
from bgen.names import index_name
from bgen.order.keys import hash_keys
from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.batches import on_cpu
from bgen.tasks.perturb.query import Query, ask
from bgen.tasks.perturb.screen import LEAST_CONTROLS, Columns, require_controls, strata_codes, whitened_latents
from bgen.tasks.perturb.transport import facts_of, times_of_perturbation, transport
from bgen.tasks.user_cells import UserCells
from bgen.version import __version__
from data_tools.check.labels import JOIN, WHOLE
from data_tools.check.quantities import read_quantities

ALL: Literal["all"] = "all"
"""All cells are controls."""

ANCHOR_CELLS = 2000
"""Control cells over which the predicted average effect is brought to its estimate."""


def perturb_cells(
    model: AnnDataModel,
    cells: UserCells,
    perturbation: str | Sequence[str],
    *,
    control: tuple[str, str] | Literal["all"] | None = None,
    dose: float | str | None = None,
    time: float | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AnnData:
    """Predict perturbed cells from control cells.

    Parameters
    ----------
    perturbation
        A gene or drug, or several: a label as in the data that the model was trained on ("A+B"), or a list.
    control
        obs column and value that choose the control cells; "all": all cells are controls; None: those with the model's
        own control labels, or all cells if the data do not have that column.
    dose
        In the unit that the model was trained with, or text with a unit ("10 uM"); needed for drugs trained at several
        doses.
    time
        Since the perturbation, in the model's unit; needed for a model that was trained on time courses.
    n
        Cells to predict; default: one for each control cell. More draw control cells again.
    seed
        The same seed gives the same cells.

    Returns
    -------
    AnnData
        Integer counts (CSR float32) of the model's genes; obs: that of the control cells, ``control_cell`` (the cell
        that it was predicted from), ``perturbation`` and ``dose``; provenance in ``uns['bgen']``, with what is unseen
        and which cells were the controls.

    Raises
    ------
    UserError
        If the model is no perturbation model, there are no control cells, or nothing is known of the perturbation.
    """
    return predict(
        prepare_controls(model, cells, control), perturbation, dose=dose, time=time, n=n, seed=seed, progress=progress
    )


@dataclass(frozen=True)
class ControlCells:
    """Control cells, encoded once for all that is asked of them.

    Attributes
    ----------
    cells
        The cells ``[N]``.
    said
        Which they are, in words.
    latents
        Their whitened latents ``[N, D + 1]``.
    coded
        Their covariates by column ``[N]``.
    contexts
        See :func:`contexts_of`.
    fingerprint
        Of the model.
    """

    model: AnnDataModel
    cells: UserCells
    said: str
    latents: Tensor
    coded: dict[str, NDArray[np.int64]]
    contexts: list[tuple[NDArray[np.intp], NDArray[np.intp]]]
    fingerprint: str


def prepare_controls(
    model: AnnDataModel, cells: UserCells, control: tuple[str, str] | Literal["all"] | None
) -> ControlCells:
    """Choose and encode control cells; see :func:`perturb_cells`.

    Raises
    ------
    UserError
        If the model knows no perturbations, or there are too few control cells.
    """
    facts_of(model.saved)
    rows, said = choose_controls(model, cells.adata, control)
    cells = cells if len(rows) == len(cells) else cells[rows]
    if len(cells) < LEAST_CONTROLS:
        raise UserError(f"There are {len(cells)} control cells; at least {LEAST_CONTROLS} are needed.")
    latents = torch.from_numpy(whitened_latents(model, cells)[0])
    contexts, print_of = contexts_of(model, cells.adata), model.saved.fingerprint()
    return ControlCells(model, cells, said, latents, model.covariates(cells), contexts, print_of)


def move(controls: ControlCells, query: Query, time: float | None, seed: int) -> Tensor:
    """Return the whitened latents ``[N, D + 1]`` that control cells would have, each context by itself."""
    moved = torch.zeros_like(controls.latents)
    for members, _ in controls.contexts:
        columns = {name: column[members] for name, column in controls.cells.columns.items()}
        at = torch.from_numpy(members)
        moved[at] = transport(controls.model.saved, controls.latents[at], columns, query.members, time=time, seed=seed)
    return moved


def predict(
    controls: ControlCells,
    perturbation: str | Sequence[str],
    *,
    dose: float | str | None = None,
    time: float | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AnnData:
    """Predict control cells under a perturbation; see :func:`perturb_cells`."""
    require_number("n", n, 1, MOST_CELLS, whole=True)
    require_number("seed", seed, 0, MOST_SEEDS, whole=True)
    model, cells, before, coded = controls.model, controls.cells, controls.latents, controls.coded
    query = ask(model, perturbation, read_dose(model, dose))
    times_of_perturbation(model.saved, time)
    perturbation = perturbation if isinstance(perturbation, str) else JOIN.join(perturbation)
    adata, codec = cells.adata, model.saved.codec
    wanted = adata.n_obs if n is None else n
    rows = draw_controls(adata.n_obs, wanted, seed)
    keys = torch.from_numpy(hash_keys(seed, np.arange(wanted)).view(np.int64))
    moved = move(controls, query, time, seed)
    order, parts, done = [], [], 0
    step = on_cpu(codec.n_genes)  # the noise of a gene is spread over the cells of a batch, so it depends on its size
    for members, among in controls.contexts:
        predicted = np.flatnonzero(np.isin(rows, members))
        own, folds = _centre(model, query, cells.counts[among], (before[among], moved[among]), _some(coded, among))
        for start in range(0, len(predicted), step):
            part = predicted[start : start + step]
            covariates = _some(coded, rows[part])
            ends = (
                decode_changed(codec, before[rows[part]], own, covariates),
                decode_changed(codec, moved[rows[part]], folds, covariates),
            )
            counts = change_counts(torch.from_numpy(cells.counts[rows[part]].toarray()).float(), *ends, keys[part])
            parts.append(sp.csr_matrix(counts.cpu().numpy().astype(np.float32)))
            order.append(part)
            done += len(part)
            if progress:
                progress("predicting", done, wanted)
    made_counts = sp.vstack(parts, format="csr")[np.argsort(np.concatenate(order))]
    obs = adata.obs.iloc[rows].copy()
    obs["control_cell"] = adata.obs_names[rows]
    obs["perturbation"], obs["dose"] = perturbation, np.nan if query.dose is None else query.dose
    obs.index = pd.Index([f"predicted_{i}" for i in range(wanted)], name=index_name("cell", obs.columns))
    var = model.saved.genes.set_index("id").rename_axis("gene")
    made = AnnData(made_counts, obs=obs, var=var)
    made.uns["bgen"] = {
        "what": "perturbed cells predicted from control cells: raw integer counts, not measurements",
        "model": controls.fingerprint,
        "version": __version__,
        "seed": seed,
        "precision": model.saved.precision,
        "perturbation": perturbation,
        "dose": "none" if query.dose is None else query.dose,
        "unseen": query.unseen,
        "notes": query.notes,
        "controls": controls.said,
    }
    return made


def draw_controls(controls: int, n: int, seed: int) -> NDArray[np.int64]:
    """Return the control cell that each of n predicted cells is made from, ascending; each once before any twice."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(controls) for _ in range(-(-n // controls))])[:n]
    return np.sort(rows)


def choose_controls(
    model: AnnDataModel, adata: AnnData, control: tuple[str, str] | Literal["all"] | None
) -> tuple[NDArray[np.intp], str]:
    """Return the rows of the control cells, and what they are in words; see :func:`perturb_cells`.

    Raises
    ------
    UserError
        If there are none, or too few.
    """
    every = np.arange(adata.n_obs)
    about = model.saved.about
    if control == ALL:
        return every, f"all {len(every):,} cells"
    if control is None:
        facts = facts_of(model.saved)
        column = next((name for name in (facts.column, about.roles.get("perturbation")) if name in adata.obs), None)
        labels = facts.controls or ([about.control] if about.control else [])
        if column is None or not labels:
            return every, f"all {len(every):,} cells (no column says which of them are controls)"
        columns = Columns(column, labels, separator=facts.separator)
        if not columns.is_control(columns.labels(adata)).any():
            there = pd.Series(columns.labels(adata)).value_counts().drop("", errors="ignore")
            if there.empty:
                return every, f"all {len(every):,} cells (none has a label in obs['{column}'])"
            raise UserError(
                f"No cell has the model's control label '{labels[0]}' in obs['{column}'] (it holds"
                f" {', '.join(there.index[:5])}). Say which cells are controls: --control {column}=LABEL, or --control"
                " all."
            )
    else:
        columns = Columns(*control, separator=WHOLE)
    label = columns.labels(adata)
    labels = [one for one in columns.controls if control is not None or (label == one).any()] or list(columns.controls)
    rows = np.flatnonzero(require_controls(label, replace(columns, control=labels)))
    return rows, f"{len(rows):,} cells with obs['{columns.perturbation}'] {', '.join(labels)}"


def read_dose(model: AnnDataModel, dose: float | str | None) -> float | None:
    """Return a dose in the model's unit.

    Raises
    ------
    UserError
        If it is no dose, or its unit cannot be converted.
    """
    if dose is None:
        return None
    unit = model.saved.about.units.get("dose")
    read = read_quantities(pd.Series([dose]), "dose", unit) if isinstance(dose, str) else None
    if read is not None and (np.isnan(read.numbers[0]) or (unit is None and read.unit is not None)):
        raise UserError(f"'{dose}' is no dose {f'in {unit}' if unit else 'without a unit, as the model has them'}.")
    number = float(dose) if read is None else float(read.numbers[0])
    if not 0 <= number < np.inf:
        raise UserError(f"A dose is a number from 0 up, not {number:g}.")
    return number


def contexts_of(model: AnnDataModel, adata: AnnData) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Return the rows of control cells of each context, and the rows whose average they share.

    Contexts are those of the columns that the model compares cells within, if the data have them all. The cells of
    contexts with few of them share one average; if they are few together, it is that of all cells.
    """
    facts, every = model.saved.about.perturbation, np.arange(adata.n_obs)
    assert facts is not None, "it knows perturbations"
    if not facts.strata or not all(name in adata.obs for name in facts.strata):
        return [(every, every)]
    stratum = strata_codes(adata, Columns("", "", strata=facts.strata))
    large = np.bincount(stratum) >= LEAST_CONTROLS
    made = [(rows, rows) for rows in (np.flatnonzero(stratum == number) for number in np.flatnonzero(large))]
    rest = np.flatnonzero(~large[stratum])
    if len(rest):
        made.append((rest, rest if len(rest) >= LEAST_CONTROLS else every))
    return made


def _centre(
    model: AnnDataModel,
    query: Query,
    counts: sp.csr_matrix,
    latents: tuple[Tensor, Tensor],
    coded: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return what to add to the decoder's logits ``[G]`` of control cells as they are, and of cells that have moved.

    ``latents`` are those of the same cells before and after.
    """
    some = np.sort(np.random.default_rng(0).permutation(counts.shape[0])[:ANCHOR_CELLS])
    covariates = {name: column[some] for name, column in coded.items()}
    shares = [mean_share(model.saved.codec, cells[some], covariates).cpu().double().numpy() for cells in latents]
    effect = np.log1p(TARGET_SUM * shares[1]) - np.log1p(TARGET_SUM * shares[0])
    if query.effects is not None:
        effect = query.effects.of(query.names, query.dose, controls_of(counts), effect, query.known)
    return anchor(shares[0], counts, np.zeros_like(effect)), anchor(shares[1], counts, effect)


def _some(coded: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column[rows]) for name, column in coded.items()}


def anchor(decoded: F64, control: sp.csr_matrix, effect: F64) -> Tensor:
    """Return what to add to the decoder's logits ``[G]``, so that the average cell is the average control cell with the
    effect.

    The average control cell is measured, so average errors of flow and decoder cancel. A gene that is off in control
    cells gets what the effect says, not a multiple of its few molecules.

    Parameters
    ----------
    decoded
        The decoder's average shares ``[G]`` of the cells before it is added.
    control
        Counts of control cells.
    effect
        ``[G]``: difference of log(1 + counts per 10,000).
    """
    library = np.maximum(np.asarray(control.sum(1, dtype=np.float64)).ravel(), 1.0)
    measured = TARGET_SUM * np.asarray(control.T @ (1 / library)) / len(library)
    wanted = np.maximum(np.expm1(np.log1p(measured) + effect), 0.0)
    # Half a molecule in all these cells is added to both sides: a gene that none of them shows would have no ratio.
    least = 0.5 * TARGET_SUM / float(library.sum())
    return torch.from_numpy(np.log((wanted + least) / (TARGET_SUM * decoded + least))).float()
