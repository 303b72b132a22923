"""Scores of a perturbation model on perturbations, or doses, that it was not trained on.

The user names what is held out; its cells and a part of the control cells are kept from training, predicted from those
control cells, and compared by the protocol ``perturbation-v3`` with baselines that need no model: control copy, train
mean, the sum of the members' training effects for combinations, and the nearest trained dose.

Axes: N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from bgen.evaluate.metrics.space import log_cp10k
from bgen.evaluate.protocols.perturbation import TRAIN_MEAN, HeldOut, PerturbationScores
from bgen.evaluate.registry import PerturbationProtocol, find_protocol
from bgen.genes.table import find_genes
from bgen.order.keys import hash_keys
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.perturb.effect_estimates import log_effect
from bgen.tasks.perturb.perturb import perturb_cells
from bgen.tasks.perturb.screen import LEAST_CONTROLS, Columns, members, require_controls, strata_codes
from bgen.tasks.user_cells import UserCells, text_column

CONTROL_SHARE = 0.25
"""Share of the control cells that held-out perturbations are predicted from; if there are few, up to half."""

NEAREST_DOSE = "nearest dose"

DOSE = "@"
"""Between a label and its dose: "dex@10"."""

Key = tuple[tuple[str, ...], float | None]
"""Members of a set, sorted, and the dose."""


def split_screen(
    adata: AnnData, columns: Columns, held_out: Sequence[str], seed: int, *, shared_controls: bool = False
) -> tuple[AnnData, AnnData]:
    """Return the cells to train on, and those that are kept back, as :func:`split_rows` says."""
    train, back = split_rows(adata, columns, held_out, seed, shared_controls=shared_controls)
    return adata[train].copy(), adata[back].copy()


def split_rows(
    adata: AnnData, columns: Columns, held_out: Sequence[str], seed: int, *, shared_controls: bool = False
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which cells are trained on ``[N]``, and which are kept back: of the held-out labels, and some controls.

    Parameters
    ----------
    held_out
        Labels, with ``@dose`` to hold out one dose only.
    shared_controls
        Put all control cells into both sets, as they would be for a user's own cells.

    Raises
    ------
    UserError
        If a label has no cells, or there are too few control cells.
    """
    label = text_column(adata, columns.perturbation)
    control = require_controls(label, columns.control, f"obs['{columns.perturbation}']")
    controls = np.flatnonzero(control)
    if len(controls) < 2 * LEAST_CONTROLS and not shared_controls:
        raise UserError(
            f"There are {len(controls)} control cells; to hold perturbations out, at least {2 * LEAST_CONTROLS} are"
            " needed: half to train on, half to predict from."
        )
    kept = max(round(CONTROL_SHARE * len(controls)), min(len(controls) // 2, 2 * LEAST_CONTROLS))
    back = np.zeros(adata.n_obs, bool)
    if not shared_controls:
        back[controls[np.argsort(hash_keys(seed, controls))[:kept]]] = True
    keys = screen_keys(adata, columns)
    for text in held_out:
        wanted = _read(text)
        here = np.array([_agrees(key, wanted) for key in keys]) & ~control
        if not here.any():
            names = sorted(set(label.tolist()) - {columns.control, ""})
            raise UserError(f"--hold-out: no cell has the label '{text}'.{nearest(text, names)}")
        back |= here
    return ~back, back | control if shared_controls else back


def score_held_out(
    model: AnnDataModel, train: UserCells, back: UserCells, columns: Columns, *, seeds: int = 3
) -> PerturbationScores:
    """Predict what was kept back and score it; both sets are as :func:`split_screen` returns them."""
    made = predict_held_out(model, train, back, columns)
    return find_protocol(PerturbationProtocol).evaluate(train.counts, made, seeds=seeds)


def predict_held_out(
    model: AnnDataModel,
    train: UserCells,
    back: UserCells,
    columns: Columns,
    *,
    seed: int = 0,
    shared_controls: bool = False,
) -> list[HeldOut]:
    """Predict every label of cells that were kept back from the control cells among them.

    Parameters
    ----------
    train
        What the model was trained on: baselines come from it.
    shared_controls
        Whether the control cells of ``back`` are in ``train``, too.
    """
    counts, held = train.counts, back.counts
    keys, held_keys = screen_keys(train.adata, columns), screen_keys(back.adata, columns)
    held_control = np.array([key[0] == (columns.control,) for key in held_keys])
    groups = _perturbed(keys, columns)
    effects = _training_effects(counts, groups, keys, train.adata, columns)
    mean = np.mean(list(effects.values()), axis=0)
    cells = back[held_control]
    made = []
    for key in sorted(set(held_keys), key=str):
        if key[0] == (columns.control,) or not key[0]:
            continue
        real = np.flatnonzero([other == key for other in held_keys])
        name = "+".join(key[0])
        n = max(len(cells), -(-len(real) // 2))  # no control cell twice, as long as there are enough
        predicted = perturb_cells(model, cells, name, dose=key[1], n=n, seed=seed)
        targets = find_genes(model.saved.genes, key[0])
        populations = {}
        if shared_controls:
            populations[TRAIN_MEAN] = counts[np.concatenate(list(groups.values()))]
            near = _nearest_dose(key, effects)
            if near is not None:
                populations[NEAREST_DOSE] = counts[groups[near]]
        made.append(
            HeldOut(
                label=name if key[1] is None else f"{name}{DOSE}{key[1]:g}",
                real=held[real],
                control=held[np.flatnonzero(held_control)],
                predicted=sp.csr_matrix(predicted.X),
                baselines={TRAIN_MEAN: mean, **_baselines(key, effects)},
                targets=targets[targets >= 0],
                shared_controls=shared_controls,
                populations=populations,
            )
        )
    return made


def _perturbed(keys: Sequence[Key], columns: Columns) -> dict[Key, NDArray[np.int64]]:
    """Return the numbers of the cells of every set and dose."""
    groups: dict[Key, list[int]] = {}
    for row, key in enumerate(keys):
        if key[0] and key[0] != (columns.control,):
            groups.setdefault(key, []).append(row)
    return {key: np.array(rows) for key, rows in groups.items()}


def _training_effects(
    counts: sp.csr_matrix,
    groups: Mapping[Key, NDArray[np.int64]],
    keys: Sequence[Key],
    train: AnnData,
    columns: Columns,
) -> dict[Key, NDArray[np.float64]]:
    """Return the effect ``[G]`` on the mean logarithm of every set and dose in training, within strata."""
    control = np.flatnonzero([key[0] == (columns.control,) for key in keys])
    stratum = strata_codes(train, columns)
    logs = log_cp10k(counts)
    return {key: log_effect(logs, rows, control, stratum) for key, rows in groups.items()}


def _baselines(key: Key, effects: Mapping[Key, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    names, dose = key
    if key in effects:  # held out are other cells of it
        return {"same in training": effects[key]}
    found = {}
    near = _nearest_dose(key, effects)
    if near is not None:
        found[NEAREST_DOSE] = effects[near]
    if len(names) > 1 and all(((name,), dose) in effects for name in names):
        found["additive"] = np.sum([effects[(name,), dose] for name in names], axis=0)
    return found


def _nearest_dose(key: Key, trained: Iterable[Key]) -> Key | None:
    """Return the trained dose above 0 of the same set that is nearest on a logarithmic scale, if there is one."""
    dose = key[1]
    others = {other[1]: other for other in trained if other[0] == key[0] and other[1]}
    if not dose or not others:
        return None
    return others[min(others, key=lambda other: abs(np.log(other / dose)))]


def screen_keys(adata: AnnData, columns: Columns) -> list[Key]:
    """Return the set and dose of every cell; controls have no dose."""
    label = text_column(adata, columns.perturbation)
    doses = np.full(adata.n_obs, np.nan) if columns.dose is None else adata.obs[columns.dose].to_numpy(np.float64)
    return [
        (tuple(sorted(members(text))), None if np.isnan(dose) or text == columns.control else float(dose))
        for text, dose in zip(label, doses, strict=True)
    ]


def _read(text: str) -> Key:
    name, sign, dose = text.partition(DOSE)
    try:
        return tuple(sorted(members(name))), float(dose) if sign else None
    except ValueError:
        raise UserError(f"--hold-out {text}: '{dose}' is no dose; write LABEL{DOSE}NUMBER.") from None


def _agrees(key: Key, wanted: Key) -> bool:
    return key[0] == wanted[0] and wanted[1] in (None, key[1])
