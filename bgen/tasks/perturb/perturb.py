"""``bgen perturb``: what the user's own control cells would look like under a perturbation.

Axes: N cells, G genes of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from bgen.errors import MOST_CELLS, MOST_SEEDS, UserError, nearest, require_number
from bgen.genes.table import find_genes
from bgen.models.generators.counterfactual import change_counts
from bgen.models.generators.perturbation_flow import PerturbationFlow, PerturbationSet
from bgen.names import index_name
from bgen.order.keys import hash_keys
from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.generate import ENTRIES
from bgen.tasks.perturb.effects import Effects
from bgen.tasks.perturb.screen import LEAST_CONTROLS, Columns, make_sets, require_controls, whitened_latents
from bgen.tasks.user_cells import UserCells
from bgen.version import __version__
from data_tools.check.labels import JOIN, WHOLE, Grammar
from data_tools.check.quantities import read_quantities

ALL: Literal["all"] = "all"
"""All cells are controls."""

STEPS = 10
ANCHOR_CELLS = 2000
"""Control cells over which the predicted average effect is brought to its estimate."""


def perturb_cells(
    model: AnnDataModel,
    cells: UserCells,
    perturbation: str | Sequence[str],
    *,
    control: tuple[str, str] | Literal["all"] | None = None,
    dose: float | str | None = None,
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
    flow = _require_flow(model)
    require_number("n", n, 1, MOST_CELLS, whole=True)
    require_number("seed", seed, 0, MOST_SEEDS, whole=True)
    rows, of_controls = choose_controls(model, cells.adata, control)
    cells = cells if len(rows) == len(cells) else cells[rows]
    adata = cells.adata
    if adata.n_obs < LEAST_CONTROLS:
        raise UserError(f"There are {adata.n_obs} control cells; at least {LEAST_CONTROLS} are needed.")
    dose = read_dose(model, dose)
    sets, effect, unseen = ask(model, perturbation, dose)
    perturbation = perturbation if isinstance(perturbation, str) else JOIN.join(perturbation)
    wanted = adata.n_obs if n is None else n
    rows = draw_controls(adata.n_obs, wanted, seed)
    keys = torch.from_numpy(hash_keys(seed, np.arange(wanted)).view(np.int64))
    latents = torch.from_numpy(whitened_latents(model, cells)[0])
    coded = model.covariates(cells)
    codes = {name: column[rows] for name, column in coded.items()}
    some = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:ANCHOR_CELLS])
    before = latents[some]
    covariates = {name: torch.from_numpy(column[some]) for name, column in coded.items()}
    moved = flow.transport(before, sets.repeat(len(some)), STEPS)
    measured = cells.counts
    own = anchor(flow, before, covariates, measured, np.zeros_like(effect))
    folds = anchor(flow, moved, covariates, measured, effect)
    parts = []
    step = max(1, ENTRIES // flow.vae.n_genes)
    for start in range(0, wanted, step):
        part = slice(start, min(start + step, wanted))
        z1 = latents[rows[part]]
        covariates = {name: torch.from_numpy(column[part]) for name, column in codes.items()}
        moved = flow.transport(z1, sets.repeat(len(z1)), STEPS)
        ends = flow.decode(z1, own, covariates), flow.decode(moved, folds, covariates)
        counts = change_counts(torch.from_numpy(measured[rows[part]].toarray()).float(), *ends, keys[part])
        parts.append(sp.csr_matrix(counts.numpy().astype(np.float32)))
        if progress:
            progress("predicting", part.stop, wanted)
    obs = adata.obs.iloc[rows].copy()
    obs["control_cell"] = adata.obs_names[rows]
    obs["perturbation"], obs["dose"] = perturbation, np.nan if dose is None else float(dose)
    obs.index = pd.Index([f"predicted_{i}" for i in range(wanted)], name=index_name("cell", obs.columns))
    var = model.saved.genes.set_index("id").rename_axis("gene")
    made = AnnData(sp.vstack(parts, format="csr"), obs=obs, var=var)
    made.uns["bgen"] = {
        "what": "perturbed cells predicted from control cells: raw integer counts, not measurements",
        "model": model.saved.fingerprint(),
        "version": __version__,
        "seed": seed,
        "perturbation": perturbation,
        "dose": "none" if dose is None else float(dose),
        "unseen": unseen,
        "controls": of_controls,
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
        facts = about.perturbation
        assert facts is not None, "checked when it was loaded"
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


def anchor(
    flow: PerturbationFlow,
    moved: Tensor,
    covariates: Mapping[str, Tensor],
    control: sp.csr_matrix,
    effect: NDArray[np.float64],
) -> Tensor:
    """Return what to add to the decoder's logits ``[G]``, so that the average cell is the control average times the
    effect.

    The control average is measured, from the counts ``control``, so average errors of flow and decoder cancel.
    ``moved`` are transported control latents, and ``effect`` natural logs ``[G]``.
    """
    decoded = flow.mean_share(moved, covariates).double()
    library = np.maximum(np.asarray(control.sum(1)).ravel(), 1.0)
    measured = torch.from_numpy(np.asarray(control.T @ (1 / library)) / len(library))
    # Half a molecule in all these cells is added to both sides: a gene that none of them shows would have no ratio.
    least = 0.5 / float(library.sum())
    return (torch.from_numpy(effect) + torch.log((measured + least) / (decoded + least))).float()


def ask(
    model: AnnDataModel, perturbation: str | Sequence[str], dose: float | None = None
) -> tuple[PerturbationSet, NDArray[np.float64], list[str]]:
    """Return the set ``[1, K]`` that a label means, its average effect ``[G]``, and the members not trained on.

    Raises
    ------
    UserError
        If a member is neither a known perturbation nor a gene of the model, or the dose is missing or wrong.
    """
    flow, facts = _require_flow(model), model.saved.about.perturbation
    assert facts is not None, "checked when it was loaded"
    names = facts.perturbations
    if isinstance(perturbation, str):
        controls = facts.controls or ([model.saved.about.control] if model.saved.about.control else [])
        is_one = perturbation in names or find_genes(model.saved.genes, [perturbation])[0] >= 0
        grammar = Grammar(tuple(controls), WHOLE if is_one else facts.separator)
        parts = [] if grammar.is_control(perturbation) else list(grammar.members(perturbation))
    else:
        parts = sorted(set(perturbation))
    if not parts:
        raise UserError(
            f"'{perturbation}' is no perturbation: name a gene or a drug, or several joined by '{facts.separator}'."
        )
    genes = find_genes(model.saved.genes, parts)
    unseen = [part for part in parts if part not in names]
    for part, gene in zip(parts, genes, strict=True):
        if part in unseen and (gene < 0 or not flow.gene_embedding[gene].any()):
            known = [*names, *model.genes]
            raise UserError(
                f"The model knows no perturbation '{part}', and no gene of that name that cells express."
                f"{nearest(part, known)} It was trained on {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )
    rows = facts.effects
    doses = sorted({row.dose for row in rows if row.dose is not None})
    own = [row for row in rows if set(row.set) & set(parts)] or rows
    if dose is not None and not doses:
        raise UserError("The model was trained without doses: leave --dose out.")
    if dose is None and any(row.dose is not None for row in own):
        raise UserError(f"Give --dose: the model was trained at {', '.join(f'{d:g}' for d in doses)}.")
    every = [*names, *unseen]
    targets = find_genes(model.saved.genes, every)
    sets = make_sets([parts], np.array([np.nan if dose is None else dose]), every, targets)
    sets.known[sets.known >= len(names)] = -1
    effects = Effects(
        [tuple(row.set) for row in rows],
        np.array([np.nan if row.dose is None else row.dose for row in rows], np.float64),
        flow.effects.numpy(),
        facts.effect_scale,
        flow.network.numpy(),
    )
    places = dict(zip(names, targets.tolist(), strict=False))
    return sets, effects.of(parts, dose, flow.gene_embedding.numpy(), genes, places), unseen


def _require_flow(model: AnnDataModel) -> PerturbationFlow:
    module: Any = model.saved.module
    if not isinstance(module, PerturbationFlow):
        raise UserError(
            f"This model is a {model.saved.kind}: it has seen no perturbations. Train it on control and perturbed"
            " cells: `bgen finetune MODEL screen.h5ad --task perturb`."
        )
    return module
