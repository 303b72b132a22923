"""Scores of a perturbation model on perturbations, or doses, that it was not trained on.

The user names what is held out; its cells and a part of the control cells are kept from training, predicted from those
control cells, and compared by the protocol ``perturbation-v4`` with baselines that need no
model (:mod:`bgen.tasks.perturb.baseline_rows`).

Control cells, and the real cells of baselines, are those of the strata of the perturbed cells, in the same proportions:
otherwise the difference between cell lines, say, would count as effect of a perturbation that one of them has.

Axes: N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.effects.contexts import Key
from bgen.errors import UserError, nearest
from bgen.evaluate.protocols.perturbation import MIN_CELLS, HeldOut, mean_log
from bgen.evaluate.protocols.perturbation_scores import PerturbationScores
from bgen.evaluate.registry import PerturbationProtocol, find_protocol
from bgen.genes.sets import GeneSets
from bgen.genes.table import find_genes
from bgen.order.keys import hash_keys
from bgen.progress import Say
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.perturb.baseline_rows import BaselineRows
from bgen.tasks.perturb.baselines import target_genes
from bgen.tasks.perturb.keys import DOSE, named, screen_keys
from bgen.tasks.perturb.perturb import ALL, draw_controls, perturb_cells
from bgen.tasks.perturb.screen import LEAST_CONTROLS, Columns, common_strata, require_controls, strata_codes
from bgen.tasks.user_cells import UserCells
from data_tools.check.labels import JOIN
from data_tools.check.quantities import read_quantities

CONTROL_SHARE = 0.25
"""Share of the control cells that held-out perturbations are predicted from; if there are few, up to half."""


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
    label = columns.labels(adata)
    control = require_controls(label, columns)
    controls = np.flatnonzero(control)
    if len(controls) < 2 * LEAST_CONTROLS and not shared_controls:
        raise UserError(
            f"There are {len(controls)} control cells; to hold perturbations out, at least {2 * LEAST_CONTROLS} are"
            " needed: half to train on, half to predict from."
        )
    back = np.zeros(adata.n_obs, bool)
    stratum = strata_codes(adata, columns)
    for number in () if shared_controls else np.unique(stratum[controls]):
        own = controls[stratum[controls] == number]
        kept = max(round(CONTROL_SHARE * len(own)), min(len(own) // 2, 2 * LEAST_CONTROLS))
        back[own[np.argsort(hash_keys(seed, own))[:kept]]] = True
    keys = screen_keys(adata, columns)
    for text in held_out:
        wanted = _read(text, columns, label)
        here = keys.where(partial(_agrees, wanted)) & ~control
        if not here.any():
            names = sorted(set(label[~control].tolist()) - {""})
            raise UserError(f"--hold-out: no cell has the label '{text}'.{nearest(text, names)}")
        back |= here
    return ~back, back | control if shared_controls else back


def score_held_out(
    model: AnnDataModel, train: UserCells, back: UserCells, columns: Columns, *, seeds: int = 3, say: Say | None = None
) -> PerturbationScores:
    """Predict what was kept back and score it; both sets are as :func:`split_screen` returns them."""
    made = predict_held_out(model, train, back, columns, say=say)
    return find_protocol(PerturbationProtocol).evaluate(train.counts, made, seeds=seeds)


def require_scorable(train: UserCells, back: AnnData, columns: Columns, genes: pd.DataFrame) -> None:
    """Check, before anything is trained, that what is held out can be predicted and scored.

    ``genes`` is the gene table of the model that is to be trained, whose counts ``train`` has.

    Raises
    ------
    UserError
        If a held-out target is neither trained on nor a gene that control cells express, a dose is missing, or there
        are too few cells of it or of control cells of its strata.
    """
    keys, held_keys = screen_keys(train.adata, columns), screen_keys(back, columns)
    expressed = np.asarray(train.counts[keys.rows(columns.control_key)].sum(0)).ravel() > 0
    trained = {name for key in keys.distinct for name in key[0] if key != columns.control_key}
    stratum = strata_codes(back, columns)
    controls = held_keys.rows(columns.control_key)
    for key, rows in held_keys.perturbed().items():
        shown = named(key)
        for name, gene in zip(key[0], find_genes(genes, key[0]), strict=True):
            if name not in trained and (gene < 0 or not expressed[gene]):
                raise UserError(
                    f"--hold-out {shown}: '{name}' cannot be predicted: no training cell has it, and it is no gene of"
                    f" the model that control cells express.{nearest(name, [*sorted(trained), *genes['id']])}"
                )
        doses = {other[1] for other in keys.distinct if other[1] is not None and set(other[0]) & set(key[0])}
        if doses and key[1] is None:
            raise UserError(f"--hold-out {shown}: some of its cells have no dose, though it is trained at doses.")
        real, _ = within_strata(stratum[rows], stratum[controls])
        if len(real) < 2 * MIN_CELLS:
            raise UserError(
                f"--hold-out {shown}: {len(real)} of its {len(rows)} cells can be compared, and {2 * MIN_CELLS} are"
                f" needed{_of_strata(columns)}."
            )
        _require_enough(key, stratum[rows], stratum[controls], columns)


def predict_held_out(
    model: AnnDataModel,
    train: UserCells,
    back: UserCells,
    columns: Columns,
    *,
    seed: int = 0,
    shared_controls: bool = False,
    contexts: Sequence[str] | None = None,
    gene_sets: GeneSets | None = None,
    say: Say | None = None,
) -> list[HeldOut]:
    """Predict every label of cells that were kept back from the control cells of the same strata among them.

    Parameters
    ----------
    train
        What the model was trained on: baselines come from it.
    shared_controls
        Whether the control cells of ``back`` are in ``train``, too.
    contexts
        obs columns of what cells that were kept back may differ in from all others; default: the strata.
    gene_sets
        For the baseline of unseen targets that needs them.
    say
        Told which cells cannot be compared, since their stratum has too few control cells.
    """
    keys, held_keys = screen_keys(train.adata, columns), screen_keys(back.adata, columns)
    genes = model.saved.genes
    contexts = columns.strata if contexts is None else contexts
    baselines = BaselineRows(train.adata, train.counts, keys, columns, genes, contexts, gene_sets)
    controls = held_keys.rows(columns.control_key)
    in_train, stratum = common_strata([train.adata, back.adata], columns)
    made = []
    for key, every in sorted(held_keys.perturbed().items(), key=lambda item: str(item[0])):
        _require_enough(key, stratum[every], stratum[controls], columns)
        kept, chosen = within_strata(stratum[every], stratum[controls])
        real, control = every[kept], controls[chosen]
        if say is not None and len(real) < len(every):
            say(
                f"{named(key)}: {len(every) - len(real):,} of {len(every):,} cells are not compared: too few control"
                f" cells have the same {', '.join(columns.strata)}."
            )
        n = max(len(control), -(-len(real) // 2))  # no control cell twice, as long as there are enough
        cells = back[control]
        predicted = perturb_cells(model, cells, key[0], control=ALL, dose=key[1], n=n, seed=seed)
        (targets,) = target_genes([key], genes)
        populations = {}
        for name, pool in baselines.cells(key).items() if shared_controls else ():
            alike = within_strata(stratum[real], in_train[pool], least=1)[1]
            if len(alike):
                populations[name] = train.counts[pool[alike]]
        made.append(
            HeldOut(
                label=named(key),
                real=back.counts[real],
                control=cells.counts,
                predicted=sp.csr_matrix(predicted.X),
                baselines=baselines.rows(key, targets, mean_log(cells.counts)),
                targets=targets,
                shared_controls=shared_controls,
                populations=populations,
                name=JOIN.join(key[0]),
                sources=draw_controls(len(control), n, seed),
            )
        )
    return made


def within_strata(
    perturbed: NDArray[np.int64], pool: NDArray[np.int64], least: int = LEAST_CONTROLS
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose cells of a pool, such as control cells, so that strata have the proportions of the perturbed cells.

    As many as there are of them. A stratum that would leave fewer than ``least`` in all is left out on both sides, the
    one with the smallest pool for its cells first.

    Parameters
    ----------
    perturbed, pool
        Stratum of each cell.

    Returns
    -------
    tuple
        Places among the perturbed cells and in the pool, ascending; both empty if nothing can be compared.
    """
    numbers, sizes = np.unique(perturbed, return_counts=True)
    there = np.array([int((pool == number).sum()) for number in numbers], np.int64)
    order = sorted(range(len(numbers)), key=lambda at: there[at] / sizes[at])
    while order:
        worst = order[0]
        taken = {at: int(there[worst]) * int(sizes[at]) // int(sizes[worst]) for at in order}
        if sum(taken.values()) >= least:
            chosen = np.concatenate([_some(np.flatnonzero(pool == numbers[at]), n) for at, n in taken.items()])
            return np.flatnonzero(np.isin(perturbed, numbers[order])), np.sort(chosen)
        order = order[1:]
    return np.zeros(0, np.int64), np.zeros(0, np.int64)


def _some(rows: NDArray[np.intp], n: int) -> NDArray[np.int64]:
    return rows[np.sort(np.argsort(hash_keys(0, rows))[:n])].astype(np.int64)


def _require_enough(key: Key, perturbed: NDArray[np.int64], control: NDArray[np.int64], columns: Columns) -> None:
    if not len(within_strata(perturbed, control)[1]):
        raise UserError(
            f"--hold-out {named(key)}: fewer than {LEAST_CONTROLS} control cells to predict it from"
            f"{_of_strata(columns)}."
        )


def _of_strata(columns: Columns) -> str:
    return f" (with the same {', '.join(columns.strata)})" if columns.strata else ""


def _read(text: str, columns: Columns, label: NDArray[np.str_]) -> Key:
    """Read a label, or a label with a dose; a label that is there as it stands is no label with a dose."""
    name, sign, dose = text.rpartition(DOSE)
    if not sign or (label == text).any():
        return columns.grammar.members(text), None
    read = read_quantities(pd.Series([dose]), "dose", columns.dose_unit)
    if np.isnan(read.numbers[0]):
        raise UserError(f"--hold-out {text}: '{dose}' is no dose; write LABEL{DOSE}NUMBER.")
    return columns.grammar.members(name), float(read.numbers[0])


def _agrees(wanted: Key, key: Key) -> bool:
    return key[0] == wanted[0] and wanted[1] in (None, key[1])
