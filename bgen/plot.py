"""Pictures of cells and models: matplotlib Axes in (or made anew), Axes out. Reports draw with the same functions.

bgen.plot.training(run.history)             losses over the steps
bgen.plot.cells(real, generated)            both on one map
bgen.plot.variance(real, generated)         variance of each gene against its mean
bgen.plot.effect(control, perturbed)        change of every gene against its evidence, the strongest named
bgen.plot.course(cells, genes, time="day")  mean expression over time
bgen.plot.scores(scores)                    the model between its baseline and real cells
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from bgen.evaluate.protocols.scores import Scores
from bgen.evaluate.reports.pictures import (
    COLOURS,
    ROW_COLOURS,
    TEXT,
    clean,
    draw_cells,
    draw_losses,
    draw_mean_variance,
    equal_moments,
    joint_layout,
    read_sets,
    type_colours,
)
from bgen.genes.expression import log_cp10k
from bgen.tasks.cells.colours import colours_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training(history: pd.DataFrame, axis: Axes | None = None) -> Axes:
    """Draw the losses of ``history``, of training in grey and of held-out cells in blue.

    Parameters
    ----------
    history
        As :attr:`bgen.api.trained.Trained.history`: ``train/nll`` and ``valid/nll`` where there are any, else
        ``train/loss`` and ``valid/loss``.

    Examples
    --------
    >>> import bgen
    >>> history = bgen.load("bgen-demo/model").history  # which `bgen demo` makes
    >>> axis = bgen.plot.training(history.loc["VAE"])
    >>> axis.figure.savefig("losses.png")
    """
    what = "nll" if "valid/nll" in history or ("train/nll" in history and "valid/loss" not in history) else "loss"
    curves = {}
    for kind, name in (("train", "train"), ("valid", "held out")):
        if f"{kind}/{what}" in history:
            values = history[f"{kind}/{what}"].dropna()
            curves[name] = (values.index.tolist(), values.tolist())
    if not curves:
        raise UserError(f"The history has neither train/{what} nor valid/{what}.")
    axis = _axis(axis, (6.2, 3.4))
    draw_losses(axis, curves, what)
    return axis


def cells(
    real: AnnData, generated: AnnData, *, cell_type: str | None = None, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """Draw real cells and generated ones on one map, t-SNE of the real cells' principal components.

    Parameters
    ----------
    real, generated
        Counts, matched by the names of genes; at most 600 cells of each are drawn, equally many.
    cell_type
        obs column of both that colours the cells, in the colours that ``real.uns`` keeps of it, as scanpy does, if it
        has one for each; default: dark grey and blue.
    axes
        Two Axes to draw on.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> real, other = simulate("tiny", seed=0), simulate("tiny", seed=1)
    >>> axes = bgen.plot.cells(real, other, cell_type="cell_type")  # `other` in place of generated cells
    >>> [axis.get_title() for axis in axes]
    ['real cells', 'generated cells']
    """
    real, generated = _same_genes(real, generated, "real and generated")
    panels = joint_layout(read_sets({"train": real, "real": real, "generated": generated}, cell_type))
    colours = type_colours(panels)
    kept = {} if cell_type is None else colours_of(real, cell_type)
    if {str(name) for panel in panels if panel.types is not None for name in panel.types} <= kept.keys():
        colours = kept
    pair = _axes(axes)
    for axis, panel in zip(pair, panels, strict=True):
        draw_cells(axis, panel, panels[0], colours)
        axis.set_title(f"{panel.name} cells", color=TEXT)
    for name, colour in colours.items():
        pair[1].scatter([], [], s=18, color=colour, label=name)
    if colours:
        pair[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return pair


def variance(real: AnnData, generated: AnnData, axis: Axes | None = None) -> Axes:
    """Draw the variance over the mean of each gene's counts against the mean, of real cells and of generated ones.

    Equally many cells of both are looked at; a gene with fewer than 20 counts in them is left out. Lines are medians.
    Counting alone would give the dotted line; what lies above it is variation between cells.

    Parameters
    ----------
    real, generated
        Counts, matched by the names of genes.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> real, other = simulate("tiny", seed=0), simulate("tiny", seed=1)
    >>> axis = bgen.plot.variance(real, other)  # `other` in place of generated cells
    >>> axis.get_ylabel()
    'variance / mean'
    """
    real, generated = _same_genes(real, generated, "real and generated")
    moments = equal_moments(read_sets({"real": real, "generated": generated}, None))
    axis = _axis(axis, (5.0, 3.8))
    draw_mean_variance(axis, moments["real"], moments["generated"], "generated")
    axis.set_ylabel("variance / mean", color=TEXT)
    return axis


def effect(control: AnnData, perturbed: AnnData, axis: Axes | None = None, *, top: int = 10) -> Axes:
    """Draw a volcano: the change of each gene's mean of log(1 + counts per 10,000) against -log10 p (Welch's t).

    Of predicted cells, p says how large a change is beside the spread of the cells, not how sure it is.

    Parameters
    ----------
    control, perturbed
        Counts, matched by the names of genes.
    top
        How many genes of the largest changes are named.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> cells = simulate("tiny", seed=0)
    >>> label = next(label for label in cells.obs["perturbation"].unique() if label != "control")
    >>> control, perturbed = (cells[cells.obs["perturbation"] == name] for name in ("control", label))
    >>> axis = bgen.plot.effect(control, perturbed, top=5)
    >>> axis.figure.savefig("volcano.png")
    """
    table = changes(control, perturbed)
    axis = _axis(axis, (5.6, 4.4))
    height = -np.log10(table["p"].clip(lower=1e-300))
    named = table["change"].abs().nlargest(top).index
    axis.scatter(table["change"], height, s=7, color="#b5b5b5", linewidths=0, rasterized=True)
    axis.scatter(table.loc[named, "change"], height[named], s=16, color=COLOURS["generated"], linewidths=0)
    for name in named:
        axis.annotate(
            str(name), (table.loc[name, "change"], height[name]), xytext=(3, 3), textcoords="offset points", fontsize=8
        )
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.set_xlabel("change of mean log(1 + counts per 10,000)", color=TEXT)
    axis.set_ylabel("-log10 p", color=TEXT)
    clean(axis)
    return axis


def changes(control: AnnData, perturbed: AnnData) -> pd.DataFrame:
    """Return for each gene its ``change`` of mean log(1 + counts per 10,000), and ``p`` by Welch's t-test.

    Parameters
    ----------
    control, perturbed
        Counts, matched by the names of genes.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> cells = simulate("tiny", seed=0)
    >>> label = next(label for label in cells.obs["perturbation"].unique() if label != "control")
    >>> control, perturbed = (cells[cells.obs["perturbation"] == name] for name in ("control", label))
    >>> table = bgen.plot.changes(control, perturbed)
    >>> table.columns.tolist(), len(table) == cells.n_vars
    (['change', 'p'], True)
    """
    from scipy.stats import t as student

    control, perturbed = _same_genes(control, perturbed, "control and perturbed")
    if min(control.n_obs, perturbed.n_obs) < 2:
        raise UserError("An effect needs two cells or more on either side.")
    (mean_0, error_0), (mean_1, error_1) = (_moments(one) for one in (control, perturbed))
    error = error_0 + error_1
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = error**2 / (error_0**2 / (control.n_obs - 1) + error_1**2 / (perturbed.n_obs - 1))
        p = 2 * student.sf(np.abs(mean_1 - mean_0) / np.sqrt(error), freedom)
    table = pd.DataFrame({"change": mean_1 - mean_0, "p": np.where(error > 0, p, 1.0)}, index=control.var_names)
    return table


def course(cells: AnnData, genes: Sequence[str], *, time: str = "time", axis: Axes | None = None) -> Axes:
    """Draw the mean of log(1 + counts per 10,000) of genes over the times of cells, real or generated.

    Parameters
    ----------
    cells
        Counts.
    genes
        Names of var.
    time
        obs column of numbers.

    Examples
    --------
    >>> import bgen
    >>> from data_tools.simulate.simulate import simulate
    >>> cells = simulate("tiny", seed=0)
    >>> axis = bgen.plot.course(cells, cells.var_names[:3], time="time")
    >>> len(axis.get_lines())
    3
    """
    if time not in cells.obs:
        raise UserError(f"obs has no column '{time}'.{nearest(time, cells.obs.columns)}")
    for name in genes:
        if name not in cells.var_names:
            raise UserError(f"There is no gene '{name}'.{nearest(name, cells.var_names)}")
    at = pd.to_numeric(cells.obs[time])
    axis = _axis(axis, (5.6, 3.6))
    logs = log_cp10k(sp.csr_matrix(cells.X))[:, cells.var_names.get_indexer(pd.Index(genes))].toarray()
    means = pd.DataFrame(logs, columns=pd.Index(genes)).groupby(at.to_numpy()).mean()
    for name in genes:
        axis.plot(means.index, means[name], marker="o", markersize=3.5, label=name)
    axis.set_xlabel(time, color=TEXT)
    axis.set_ylabel("mean log(1 + counts per 10,000)", color=TEXT)
    axis.legend(frameon=False, fontsize=9)
    clean(axis)
    return axis


def scores(found: Scores, axis: Axes | None = None) -> Axes:
    """Draw each measure of ``model.evaluate``: the model, its baseline, and real cells at 1.

    Each line is scaled so that the worst of the three is at 0 and the best at 1.

    Parameters
    ----------
    found
        What ``model.evaluate`` gave.

    Examples
    --------
    >>> import bgen
    >>> model = bgen.load("bgen-demo/model")  # `bgen demo` makes it, and the store
    >>> scores = model.evaluate("bgen-demo/store", "report", seeds=2, progress=False)
    >>> axis = bgen.plot.scores(scores)
    >>> axis.figure.savefig("scores.png")
    """
    shown = list(found.scores)
    axis = _axis(axis, (6.4, 0.9 + 0.27 * len(shown)))
    places = np.arange(len(shown))[::-1]
    for row, colour in ROW_COLOURS.items():
        name = "real cells" if row == "ceiling" else row
        at = [one.places[row] for one in shown]
        axis.plot(at, places, "|" if row == "ceiling" else "o", color=colour, label=name, markersize=8)
    axis.set_yticks(places, [one.metric.title for one in shown])
    axis.set(xlim=(-0.05, 1.05), xticks=[0, 1], xticklabels=["worst", "best"])
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    clean(axis)
    return axis


def _same_genes(first: AnnData, second: AnnData, what: str) -> tuple[AnnData, AnnData]:
    """Return both with the genes that they share, in the order of the first."""
    if first.var_names.equals(second.var_names):
        return first, second
    shared = first.var_names[first.var_names.isin(second.var_names)]
    if len(shared) < 2 or not (first.var_names.is_unique and second.var_names.is_unique):
        raise UserError(
            f"{what} share {len(shared)} names of genes: set var_names of both to the same kind of unique names."
        )
    return first[:, shared], second[:, shared]


def _moments(cells: AnnData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and squared standard error ``[G]`` of log(1 + counts per 10,000)."""
    logs = log_cp10k(sp.csr_matrix(cells.X))
    mean = np.asarray(logs.mean(0), np.float64).ravel()
    square = np.asarray(logs.multiply(logs).mean(0), np.float64).ravel()
    n = cells.n_obs
    return mean, np.maximum(square - mean**2, 0) / (n - 1)


def _axis(axis: Axes | None, size: tuple[float, float]) -> Axes:
    if axis is not None:
        return axis
    from matplotlib import pyplot

    _, made = pyplot.subplots(figsize=size, layout="constrained")
    return made


def _axes(axes: Sequence[Axes] | None) -> Sequence[Axes]:
    if axes is not None:
        if len(axes) != 2:
            raise UserError(f"Two Axes are needed, for real and for generated cells, not {len(axes)}.")
        return axes
    from matplotlib import pyplot

    made: Any = pyplot.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    return list(made[1])
