"""The pictures of a report: embedding side by side, mean against variance, histograms, loss curves.

Each returns a matplotlib Figure made without pyplot, so nothing global is touched and no display is needed. Real cells
are dark grey, generated ones blue, the baseline's orange, everywhere (Okabe and Ito's palette, safe for colour-blind
readers); cell types have Petroff's ten colours (arXiv 2107.02270).

Axes: N cells, G genes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bgen.evaluate.metrics.counts import GeneMoments, gene_moments, genes_per_cell
from bgen.evaluate.metrics.space import fit_space
from bgen.evaluate.protocols.inputs import UNLABELLED, Cells, read_cells
from bgen.files import write_whole
from bgen.genes.expression import library_size

COLOURS = {"real": "#4a4a4a", "generated": "#0072B2", "baseline": "#E69F00"}
ROW_COLOURS = {"model": COLOURS["generated"], "baseline": COLOURS["baseline"], "ceiling": "#222222"}
"""Of the rows of scores."""

TYPE_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
OTHER = "other types"
_GREY = "#d9d9d9"
TEXT = "#222222"
WIDTH = 10.0  # inches
_LAYOUT_CELLS = 600  # per panel: enough to see shapes, and t-SNE stays within seconds
_FIT_CELLS = 10_000

Series = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """Cells of one set in the common two-dimensional layout: xy float32 [N, 2], types str [N] or None."""

    name: str
    xy: NDArray[np.float32]
    types: NDArray[np.str_] | None


def read_sets(sets: Mapping[str, AnnData], cell_type: str | None) -> dict[str, Cells]:
    """Return counts and types of named sets ("train", "real", "generated", "baseline") that share their genes."""
    return read_cells(sets, cell_type, typed=())


def joint_layout(sets: Mapping[str, Cells]) -> list[Panel]:
    """Place equally many cells of every set but "train" in one plane: t-SNE of the principal components of train.

    All are laid out together, so that a place means the same in each panel; the components come from the training
    cells alone. Deterministic for given cells.
    """
    space = fit_space(_some(sets["train"], _FIT_CELLS).counts)
    shown = {name: cells for name, cells in sets.items() if name != "train"}
    each = min(_LAYOUT_CELLS, *(len(cells) for cells in shown.values()))
    picked = {name: _some(cells, each) for name, cells in shown.items()}
    points = np.concatenate([space.project(cells.counts) for cells in picked.values()])
    perplexity = min(30.0, (len(points) - 1) / 4)
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    from sklearn.manifold import TSNE

    plane = (
        TSNE(init="pca", perplexity=perplexity, random_state=0, max_iter=600).fit_transform(points).astype(np.float32)
    )
    parts = np.split(plane, len(picked))
    return [Panel(name, xy, cells.types) for (name, cells), xy in zip(picked.items(), parts, strict=True)]


def embedding_figure(panels: Sequence[Panel], titles: Mapping[str, str]) -> Figure:
    """Draw the panels side by side on the same axes, with the real cells in light grey behind the others."""
    colours = type_colours(panels)
    figure = Figure(figsize=(WIDTH, WIDTH / len(panels) + 0.95))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axis, panel in zip(np.atleast_1d(axes), panels, strict=True):
        draw_cells(axis, panel, panels[0], colours)
        axis.set_title(titles[panel.name], fontsize=12, color=TEXT, pad=6)
    rows = _type_legend(figure, colours, columns=5)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.03 + 0.055 * rows, wspace=0.04)
    return figure


def draw_cells(axis: Axes, panel: Panel, backdrop: Panel, colours: Mapping[str, str]) -> None:
    """Draw one panel of the layout; cells without types take their set's colour."""
    if panel is not backdrop:
        axis.scatter(backdrop.xy[:, 0], backdrop.xy[:, 1], s=7, color=_GREY, linewidths=0, rasterized=True)
    if panel.types is None or not colours:
        point_colours = [COLOURS.get(panel.name, COLOURS["real"])] * len(panel.xy)
    else:
        point_colours = [colours.get(name, _GREY) for name in panel.types.tolist()]
    axis.scatter(panel.xy[:, 0], panel.xy[:, 1], s=7, c=point_colours, linewidths=0, rasterized=True)
    axis.set(xticks=[], yticks=[])
    axis.margins(0.04)
    for spine in axis.spines.values():
        spine.set_color("#cccccc")


def type_colours(panels: Sequence[Panel]) -> dict[str, str]:
    """Return a colour per type, the commonest in real cells first; beyond ten, the rest share grey."""
    known = [panel.types for panel in panels if panel.types is not None]
    if not known:
        return {}
    names, counts = np.unique(known[0], return_counts=True)
    order = [str(name) for name in names[np.argsort(-counts, kind="stable")]]
    order += sorted({name for types in known[1:] for name in types.tolist()} - set(order))
    order = [name for name in order if name != UNLABELLED]
    kept = order if len(order) <= len(TYPE_COLOURS) else order[: len(TYPE_COLOURS) - 1]
    colours = dict(zip(kept, TYPE_COLOURS, strict=False))
    return colours | ({OTHER: _GREY} if len(kept) < len(order) else {})


def mean_variance_figure(sets: Mapping[str, Cells]) -> Figure:
    """Draw the variance of every gene against its mean: real cells behind, generated and baseline in front."""
    moments = equal_moments(sets)
    others = [name for name in moments if name != "real"]
    figure = Figure(figsize=(WIDTH, 4.0))
    axes = figure.subplots(1, len(others), sharex=True, sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, others, strict=True):
        draw_mean_variance(axis, moments["real"], moments[name], name)
    axes[0].set_ylabel("variance / mean", color=TEXT)
    figure.tight_layout()
    return figure


def equal_moments(sets: Mapping[str, Cells]) -> dict[str, GeneMoments]:
    """Return gene moments of each set but "train" over equally many cells, so that the rarest genes compare."""
    shown = {name: cells for name, cells in sets.items() if name != "train"}
    each = min(len(cells) for cells in shown.values())
    return {name: gene_moments(_some(cells, each).counts) for name, cells in shown.items()}


def draw_mean_variance(axis: Axes, real: GeneMoments, other: GeneMoments, name: str) -> None:
    """Draw one cloud of genes over the real one, with its medians as a line.

    Variance is divided by the mean, so that Poisson noise is a level line and what exceeds it has room. Genes with
    fewer than 20 counts in the sample are left out: their ratio says little.
    """
    clouds = {}
    for moments, label in ((real, "real"), (other, name)):
        seen = (moments.mean * moments.cells >= 20) & (moments.variance > 0)
        clouds[label] = moments.mean[seen], moments.variance[seen] / moments.mean[seen]
    axis.scatter(*clouds["real"], s=8, color="#b5b5b5", alpha=0.6, linewidths=0, rasterized=True)
    axis.scatter(*clouds[name], s=4, color=COLOURS[name], alpha=0.35, linewidths=0, rasterized=True)
    for label, width in (("real", 4.5), (name, 2.0)):
        line = _running_median(*clouds[label])
        axis.plot(*line, color="white", linewidth=width + 1.6)
        axis.plot(*line, color=COLOURS[label], linewidth=width, label=label)
    axis.axhline(1.0, color=TEXT, linewidth=0.8, linestyle=(0, (2, 3)), label="Poisson")
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("mean count of a gene", color=TEXT)
    axis.legend(frameon=False, fontsize=9, loc="upper left", handlelength=1.6)
    clean(axis)


def histogram_figure(sets: Mapping[str, Cells]) -> Figure:
    """Draw the distributions of library size, genes per cell and share of zeros per gene, of every set but train."""
    shown = {name: cells for name, cells in sets.items() if name != "train"}
    moments = equal_moments(sets)
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.subplots(1, 3)
    _histogram(axes[0], {name: library_size(cells.counts) for name, cells in shown.items()}, "counts per cell", True)
    genes = {name: genes_per_cell(cells.counts).astype(np.float64) for name, cells in shown.items()}
    _histogram(axes[1], genes, "genes per cell", False)
    _histogram(axes[2], {name: moments[name].zeros for name in shown}, "share of zeros, per gene", False)
    axes[2].set_yscale("log")
    axes[0].set_ylabel("share of cells", color=TEXT)
    axes[2].set_ylabel("share of genes", color=TEXT)
    axes[0].legend(frameon=False, fontsize=9, handlelength=1.2)
    figure.tight_layout()
    return figure


def loss_curves(rows: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Series]]:
    """Return what is minimised, "nll" where the rows have it, else "loss", as curves of the rows of one run's record.

    Rows have ``kind`` ("train", "valid" or others), ``step`` and losses; a loss that was not finite is None.
    """
    losses = [row for row in rows if row.get("kind") in ("train", "valid")]
    what = "nll" if losses and all("nll" in row for row in losses) else "loss"
    curves: dict[str, Series] = {}
    for kind, name in (("train", "train"), ("valid", "held out")):
        points = [(row["step"], row[what]) for row in losses if row["kind"] == kind and row.get(what) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            curves[name] = (steps, values)
    return what, curves


def loss_figure(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """Draw one panel per stage from the rows of its record, training in grey; None if no loss was recorded."""
    drawn = {stage: loss_curves(rows) for stage, rows in stages.items()}
    drawn = {stage: (what, curves) for stage, (what, curves) in drawn.items() if curves}
    if not drawn:
        return None
    figure = Figure(figsize=(WIDTH if len(drawn) > 1 else WIDTH * 0.62, 3.4))
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, (stage, (what, curves)) in zip(axes, drawn.items(), strict=True):
        draw_losses(axis, curves, what)
        axis.set_title(stage, fontsize=12, color=TEXT, loc="left")
    figure.tight_layout()
    return figure


def draw_losses(axis: Axes, curves: Mapping[str, Series], what: str) -> None:
    """Draw the curves of :func:`loss_curves`."""
    for name, (steps, values) in curves.items():
        colour, width, marker = ("#8a8a8a", 1.0, None) if name == "train" else ("#0072B2", 2.0, "o")
        axis.plot(steps, values, label=name, color=colour, linewidth=width, marker=marker, markersize=3.5)
    axis.set_ylim(*_without_start([values for _, values in curves.values()]))
    axis.set_xlabel("step", color=TEXT)
    axis.set_ylabel("negative log-likelihood per cell" if what == "nll" else "loss", color=TEXT)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.legend(frameon=False, fontsize=9)
    clean(axis)


def hero_picture(
    path: str | Path, train: AnnData, test: AnnData, generated: AnnData, *, cell_type: str | None = None
) -> Path:
    """Write one PNG (real | generated | mean-variance) for a README, below 250 kB; return its path."""
    sets = read_sets({"train": train, "real": test, "generated": generated}, cell_type)
    panels = joint_layout(sets)
    colours = type_colours(panels)
    figure = Figure(figsize=(12.0, 4.75))
    left, middle, right = figure.subplots(1, 3)
    for axis, panel, title in (
        (left, panels[0], "real cells, held out"),
        (middle, panels[1], "generated cells (grey: real)"),
    ):
        draw_cells(axis, panel, panels[0], colours)
        axis.set_title(title, fontsize=13, color=TEXT, pad=8)
    moments = equal_moments(sets)
    draw_mean_variance(right, moments["real"], moments["generated"], "generated")
    right.set_title("variance / mean of each gene", fontsize=13, color=TEXT, pad=8)
    rows = _type_legend(figure, colours, columns=4, left=True)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.03 + 0.055 * max(rows, 2), wspace=0.04)
    box = right.get_position()
    right.set_position((box.x0 + 0.045, box.y0, box.width - 0.045, box.height))
    target = Path(path)
    write_whole(target, png(figure, dpi=100))
    return target


def png(figure: Figure, dpi: int = 150) -> bytes:
    """Return the figure as PNG on white."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _some(cells: Cells, count: int) -> Cells:
    """Return a fixed random ``count`` of the cells."""
    rows = np.random.default_rng(0).permutation(len(cells))[:count]
    return Cells(cells.counts[rows], None if cells.types is None else cells.types[rows])


def _type_legend(figure: Figure, colours: Mapping[str, str], columns: int, left: bool = False) -> int:
    """Draw the legend of types below the panels, in the middle or at the left; return its rows."""
    if not colours:
        return 0
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, markersize=6, label=name)
        for name, colour in colours.items()
    ]
    figure.legend(
        handles=handles,
        loc="lower left" if left else "lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        columnspacing=1.2,
        borderaxespad=0.3,
        labelcolor=TEXT,
    )
    return -(-len(handles) // columns)


def _running_median(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return medians of x and y in 16 equal bins of log x, where a bin holds at least 10 points."""
    bins = pd.cut(pd.Series(np.log10(x)), 16, labels=False).to_numpy() if len(x) else np.empty(0)
    grouped = pd.DataFrame({"x": x, "y": y}).groupby(bins)
    medians = grouped.median()[grouped.size() >= 10]
    return medians["x"].to_numpy(), medians["y"].to_numpy()


def _histogram(axis: Axes, values: Mapping[str, NDArray[np.float64]], label: str, log: bool) -> None:
    pooled = np.concatenate(list(values.values()))
    low, high = (max(pooled.min(), 1.0), pooled.max()) if log else (pooled.min(), pooled.max())
    high = max(high, low * (1 + 1e-6) + 1e-6)
    edges = np.geomspace(low, high, 30) if log else np.linspace(low, high, 30)
    for name, part in values.items():
        weights = np.full(len(part), 1.0 / len(part))
        fill = (
            {"histtype": "stepfilled", "color": "#c9c9c9"}
            if name == "real"
            else {"histtype": "step", "linewidth": 1.8, "color": COLOURS[name]}
        )
        axis.hist(part, bins=edges.tolist(), weights=weights, label=name, **fill)
    if log:
        axis.set_xscale("log")
    axis.set_xlabel(label, color=TEXT)
    clean(axis)


def _without_start(series: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return limits that show where the curves go: the first tenth of each, often far above, does not count."""
    late = np.concatenate([np.asarray(values, dtype=float)[len(values) // 10 :] for values in series])
    late = late[np.isfinite(late)]
    if len(late) == 0:
        return 0.0, 1.0
    margin = 0.08 * max(float(np.ptp(late)), 1e-3 * abs(float(late.mean())), 1e-12)
    return float(late.min()) - margin, float(late.max()) + margin


def clean(axis: Axes) -> None:
    """Draw an axis with two thin spines."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(colors=TEXT, which="both", labelsize=9, color="#999999")
