"""``bgen perturb``: what the user's own control cells would look like under a perturbation.

Axes: N cells, G genes of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from bgen.errors import UserError, nearest
from bgen.genes.table import find_genes
from bgen.models.generators.counterfactual import change_counts
from bgen.models.generators.perturbation_flow import PerturbationFlow, PerturbationSet
from bgen.order.keys import hash_keys
from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.generate import ENTRIES
from bgen.tasks.perturb.effects import Effects
from bgen.tasks.perturb.screen import LEAST_CONTROLS, make_sets, members, require_controls, whitened_latents
from bgen.tasks.user_cells import UserCells, text_column
from bgen.version import __version__

STEPS = 10
ANCHOR_CELLS = 2000
"""Control cells over which the predicted average effect is brought to its estimate."""


def perturb_cells(
    model: AnnDataModel,
    cells: UserCells,
    perturbation: str,
    *,
    control: tuple[str, str] | None = None,
    dose: float | None = None,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AnnData:
    """Predict perturbed cells from control cells.

    Parameters
    ----------
    perturbation
        A gene or drug, or several joined by "+".
    control
        obs column and value that choose the control cells; default: all cells are controls.
    dose
        In the unit that the model was trained with; needed for drugs trained at several doses.
    n
        Cells to predict; default: one for each control cell. More draw control cells again.
    seed
        The same seed gives the same cells.

    Returns
    -------
    AnnData
        Integer counts (CSR float32) of the model's genes; obs: that of the control cells, ``control_cell`` (the cell
        that it was predicted from), ``perturbation`` and ``dose``; provenance in ``uns['bgen']``, with what is unseen.

    Raises
    ------
    UserError
        If the model is no perturbation model, there are no control cells, or nothing is known of the perturbation.
    """
    flow = _require_flow(model)
    if control is not None:
        cells = cells[require_controls(text_column(cells.adata, control[0]), control[1], f"obs['{control[0]}']")]
    adata = cells.adata
    if adata.n_obs < LEAST_CONTROLS:
        raise UserError(f"There are {adata.n_obs} control cells; at least {LEAST_CONTROLS} are needed.")
    sets, effect, unseen = ask(model, perturbation, dose)
    rng = np.random.default_rng(seed)
    wanted = adata.n_obs if n is None else n
    rows = np.concatenate([rng.permutation(adata.n_obs) for _ in range(-(-wanted // adata.n_obs))])[:wanted]
    rows = np.sort(rows)
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
    obs.index = pd.Index([f"predicted_{i}" for i in range(wanted)], name="cell")
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
    }
    return made


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
    model: AnnDataModel, perturbation: str, dose: float | None = None
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
    parts = members(perturbation)
    if not parts or perturbation == model.saved.about.control:
        raise UserError(f"'{perturbation}' is no perturbation: name a gene or a drug, or several joined by '+'.")
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
    if dose is not None and not dose >= 0:
        raise UserError(f"A dose is a number from 0 up, not {dose:g}.")
    if dose is not None and not doses:
        raise UserError("The model was trained without doses: leave --dose out.")
    if dose is None and doses:
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
