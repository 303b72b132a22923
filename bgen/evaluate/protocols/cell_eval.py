"""The figures of cell-eval (Arc Institute; MIT licence; extra ``perturb``) for held-out perturbations.

They are computed by the library itself, from log-normalised cells: per perturbation, then averaged. Beside the model
stands a copy of the control cells as a prediction, and the library's own ceiling: half of the real cells against the
other half, corrected to their full number, for the figures for which it gives one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from rich.table import Table

from bgen.errors import UserError
from bgen.evaluate.protocols.perturbation import HeldOut
from bgen.evaluate.protocols.perturbation_scores import CEILING, CONTROL_COPY, MODEL
from bgen.genes.expression import log_cp10k

PROFILE = "full"
SKIPPED = ["clustering_agreement"]
"""It clusters cells at many resolutions, and says little for few perturbations."""

_COLUMN, _CONTROL = "perturbation", "control"
Figures = dict[str, dict[str, float | None]]
"""Row to the library's name of a figure to its mean over perturbations."""


def require_cell_eval() -> None:
    """Raise UserError if the library is not installed."""
    try:
        import cell_eval  # noqa: F401
    except ImportError:
        raise UserError("--cell-eval needs the library: pip install 'bgen-flow[perturb]'.") from None


def cell_eval_figures(held_out: Sequence[HeldOut], *, seed: int = 0) -> Figures:
    """Return cell-eval's figures; perturbations with other control cells are judged by themselves, and averaged.

    Raises
    ------
    UserError
        If the library is not installed.
    """
    require_cell_eval()
    groups: dict[str, list[HeldOut]] = {}
    for one in held_out:
        groups.setdefault(_digest(one.control), []).append(one)
    return average([_figures(group, seed) for group in groups.values()], [len(group) for group in groups.values()])


def _digest(cells: sp.csr_matrix) -> str:
    arrays = (cells.indptr, cells.indices, cells.data)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def _figures(held_out: Sequence[HeldOut], seed: int) -> Figures:
    """Return the figures of perturbations that have the same control cells."""
    from cell_eval import MetricsEvaluator

    rng = np.random.default_rng(seed)
    control = held_out[0].control
    real = _joined(held_out, [one.real for one in held_out])
    copies = [control[rng.integers(control.shape[0], size=one.real.shape[0])] for one in held_out]
    found: Figures = {}
    # The library shows a progress bar for each of its figures.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        for row, cells in ((MODEL, [one.predicted for one in held_out]), (CONTROL_COPY, copies)):
            judge = MetricsEvaluator(
                _joined(held_out, cells), real.copy(), control_pert=_CONTROL, pert_col=_COLUMN, num_threads=1,
                outdir=folder,
            )  # fmt: skip
            figures, _ = judge.compute(PROFILE, skip_metrics=SKIPPED, write_csv=False)
            found[row] = _means(figures.to_pandas())
        _, best = judge.compute_ceiling(PROFILE, skip_metrics=SKIPPED, write_csv=False, seed=seed)
        found[CEILING] = _means(best.to_pandas())
    return found


def average(parts: Sequence[Figures], weights: Sequence[float] | None = None) -> Figures:
    """Return the (weighted) means of several sets of figures; None where one of them has none."""

    def mean(row: str, name: str) -> float | None:
        values = [part[row].get(name) for part in parts]
        known = [value for value in values if value is not None]
        return float(np.average(known, weights=weights)) if len(known) == len(values) else None

    return {row: {name: mean(row, name) for name in figures} for row, figures in parts[0].items()}


def figures_table(figures: Figures) -> Table:
    """Return a table: a line per figure, a column per row."""
    table = Table(title="cell-eval", box=None, pad_edge=False)
    table.add_column("")
    for row in figures:
        table.add_column(row, justify="right")
    for name in figures[MODEL]:
        values = [figures[row].get(name) for row in figures]
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    return table


def _joined(held_out: Sequence[HeldOut], cells: Sequence[sp.csr_matrix]) -> AnnData:
    """Return the control cells and cells of every perturbation, log-normalised."""
    control = held_out[0].control
    labels = np.repeat(
        [_CONTROL, *(one.label for one in held_out)], [control.shape[0], *(some.shape[0] for some in cells)]
    )
    counts = sp.vstack([control, *cells], format="csr")
    obs = pd.DataFrame({_COLUMN: pd.Categorical(labels)}, index=[str(row) for row in range(len(labels))])
    return AnnData(log_cp10k(counts).astype(np.float32), obs=obs)


def _means(table: pd.DataFrame) -> dict[str, float | None]:
    means = table.select_dtypes("number").mean()
    return {str(name): float(value) if np.isfinite(value) else None for name, value in means.items()}
