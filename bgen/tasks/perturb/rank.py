"""``bgen screen``: which perturbations would move a user's control cells towards other cells of theirs.

Control cells are predicted under each perturbation and compared with the target population in the latent space, by the
energy distance: 1 is arrived, 0 is no nearer than control cells are, below 0 is further away.

Axes: n control cells, m target cells, D latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bgen.errors import UserError, nearest
from bgen.progress import Progress
from bgen.tasks.anndata_model import AnnDataModel
from bgen.tasks.columns import require_column, text_column
from bgen.tasks.perturb.perturb import choose_controls, move, prepare_controls, read_dose
from bgen.tasks.perturb.query import ask, members_of, trained_doses, trained_sets
from bgen.tasks.perturb.screen import LEAST_CONTROLS, whitened_latents
from bgen.tasks.user_cells import UserCells
from data_tools.check.labels import JOIN

CELLS = 1000
"""Cells of either population that are looked at, at most."""


def rank_perturbations(
    model: AnnDataModel,
    cells: UserCells,
    towards: tuple[str, str],
    *,
    perturbations: Sequence[str] | None = None,
    control: tuple[str, str] | Literal["all"] | None = None,
    dose: float | str | None = None,
    time: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Rank perturbations by how far they move control cells towards a target population.

    Only the flow is asked, whose cells are compared as whole populations; average effects on genes are left out.

    Parameters
    ----------
    towards
        obs column and value of the target cells.
    perturbations
        Labels, also unseen ones; None: all that the model was trained on.
    control, dose, time
        As for :func:`bgen.tasks.perturb.perturb.perturb_cells`. dose None: the highest that each was trained at.

    Returns
    -------
    DataFrame
        Best first: ``perturbation``, ``dose``, ``nearer`` (see the top of this file), ``way`` (cosine of the mean
        movement with the way from control to target), ``moved`` (its length over that of the way), ``seen`` (whether
        it was trained on as it stands).

    Raises
    ------
    UserError
        If there are too few target or control cells, or the model does not know a perturbation.
    """
    column, value = towards
    require_column(cells.adata, column)
    label = text_column(cells.adata, column)
    there = np.flatnonzero(label == value)
    if len(there) < LEAST_CONTROLS:
        found = nearest(value, sorted({*label.tolist()} - {""}))
        raise UserError(
            f"{len(there)} cells have obs['{column}'] {value}; at least {LEAST_CONTROLS} are needed.{found}"
        )
    rows, _ = choose_controls(model, cells.adata, control)
    rows = rows[~np.isin(rows, there)]
    if len(rows) < LEAST_CONTROLS:
        raise UserError(f"There are {len(rows)} control cells beside the target; at least {LEAST_CONTROLS} are needed.")
    rng = np.random.default_rng([seed, 8])
    rows, there = (np.sort(rng.permutation(some)[:CELLS]) for some in (rows, there))
    if perturbations is None:
        sets = [sorted(members) for members in trained_sets(model.saved) if members]
    else:
        sets = [members_of(model, name) for name in perturbations]
    wanted, given, queries = {JOIN.join(members): members for members in sets}, read_dose(model, dose), []
    for members in wanted.values():
        doses = trained_doses(model.saved, members) if given is None else []
        queries.append(ask(model, members, doses[-1] if doses else given))
    controls = prepare_controls(model, cells[rows], "all")
    before = controls.latents[:, :-1]
    target = torch.from_numpy(whitened_latents(model, cells[there])[0])[:, :-1]
    way = (target.mean(0) - before.mean(0)).double()
    start = energy(before, target)
    if start <= 0:
        raise UserError(
            f"The model cannot tell the control cells from those of obs['{column}'] {value}, so there is no way to rank"
            " perturbations by."
        )
    found_rows = []
    for number, (name, query) in enumerate(zip(wanted, queries, strict=True)):
        moved = move(controls, query, time, seed)[:, :-1]
        step = (moved.mean(0) - before.mean(0)).double()
        found_rows.append(
            {
                "perturbation": name,
                "dose": query.dose,
                "nearer": 1 - energy(moved, target) / start,
                "way": float(step @ way / (step.norm() * way.norm()).clamp_min(1e-12)),
                "moved": float(step.norm() / way.norm().clamp_min(1e-12)),
                "seen": not query.notes,
            }
        )
        if progress:
            progress("screening", number + 1, len(queries))
    return pd.DataFrame(found_rows).sort_values("nearer", ascending=False, ignore_index=True)


def energy(x: Tensor, y: Tensor) -> float:
    """Return the energy distance of populations ``[n, D]`` and ``[m, D]``."""
    n, m = len(x), len(y)
    between = torch.cdist(x, y).mean()
    within = torch.cdist(x, x).sum() / max(n * (n - 1), 1) + torch.cdist(y, y).sum() / max(m * (m - 1), 1)
    return float(2 * between - within)
