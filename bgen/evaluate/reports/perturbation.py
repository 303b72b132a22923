"""One self-contained HTML page about predicted perturbations: words, table, and three pictures.

Axes: P perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bgen.evaluate.metrics.metric import ARROWS, Metric
from bgen.evaluate.protocols.perturbation_scores import (
    CEILING,
    CONTROL_COPY,
    DUPLICATE,
    MAIN,
    MODEL,
    PerturbationScores,
)
from bgen.evaluate.reports.page import facts_table, figure, write_page
from bgen.evaluate.reports.pictures import COLOURS, TEXT, WIDTH, clean

MOST_BARS = 30
COLUMNS = 4
"""Panels side by side."""

_CEILING_COLOUR = "#222222"
_BASELINE_COLOURS = (COLOURS["baseline"], "#CC79A7", "#009E73")
_KEY = "pearson"
"""The figure of the bars."""


def write_perturbation_report(
    path: str | Path,
    scores: PerturbationScores,
    *,
    title: str = "How good are the predicted perturbations?",
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write the page, whole or not at all, and return its path; ``provenance`` are facts for its foot."""
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in scores.sentences())
    shown = min(len(scores.labels), MOST_BARS)
    which = "all" if shown == len(scores.labels) else f"the {shown} with the largest real effects of"
    line = (
        f" Line: what the calibration says, {scores.cell(MODEL, _metric(scores, 'calibration'), ', ')}, freed of noise."
        if scores.has(MODEL, "calibration")
        else ""
    )
    chosen = [MODEL, *best_baselines(scores), *(row for row in (DUPLICATE, CEILING) if row in scores.figures)]
    parts = [
        f"<ul>{words}</ul>",
        "<h2>Scores</h2>",
        _table(scores, [row for row in chosen if row != CONTROL_COPY]),
        f'<p class="small">{_meanings(scores)}</p>',
        "<h2>Every figure, with its interval</h2>",
        figure(
            interval_figure(scores),
            "Means with intervals of the model, the baselines, the duplicate and the ceiling",
            "Dots are means, lines 95 % intervals over perturbations, whose replicates count as one. Blue: the"
            " model. Orange: baselines. Black: other real cells of the same perturbation (ceiling), and the same drawn"
            " towards the mean of all perturbations (duplicate): what a figure can reach.",
        ),
        "<h2>Every baseline</h2>",
        _table(scores, [MODEL, *scores.baselines]),
        "<h2>Effects on genes</h2>",
        figure(
            effect_figure(scores),
            "Real against predicted effect of each gene",
            "A dot is a gene under a perturbation, targets left out: difference of mean log(1 + counts per 10,000) to"
            f" the control cells. Dashed: as large as predicted.{line}",
        ),
        "<h2>Each perturbation</h2>",
        figure(
            bar_figure(scores),
            "Pearson delta of each perturbation",
            f"Correlation over genes of predicted and real effects, {which} {len(scores.labels)} perturbations, the"
            " largest real effect on top. Real effects are noisy, too: the ceiling is the correlation of two halves.",
        ),
        facts_table({"protocol": scores.protocol, "perturbations": scores.n_perturbations, **(provenance or {})}),
    ]
    return write_page(path, title, scores.headline(), parts)


def best_baselines(scores: PerturbationScores) -> list[str]:
    """Return up to three baselines that explain most, the best first; without the control copy."""
    values = {row: scores.mean(row, MAIN) for row in scores.baselines if row != CONTROL_COPY}
    return sorted(values, key=lambda row: -np.nan_to_num(values[row], nan=-np.inf))[: len(_BASELINE_COLOURS)]


def effect_figure(scores: PerturbationScores) -> Figure:
    """Draw the real against the predicted effect of every gene under every perturbation, and the calibration."""
    figure = Figure(figsize=(0.62 * WIDTH, 4.6))
    axis = figure.subplots()
    limit = 1.05 * max(float(np.nanmax(np.abs(scores.real))), float(np.nanmax(np.abs(scores.predicted))), 1e-3)
    ends = np.array([-limit, limit])
    axis.scatter(
        scores.predicted.ravel(), scores.real.ravel(), s=5, color=COLOURS["generated"], alpha=0.35, linewidths=0,
        rasterized=True,
    )  # fmt: skip
    axis.plot(ends, ends, "--", color="#999999", linewidth=1)
    if scores.has(MODEL, "calibration"):
        axis.plot(ends, scores.mean(MODEL, "calibration") * ends, color=_CEILING_COLOUR, linewidth=1.2)
    axis.set(xlim=ends, ylim=ends)
    axis.set_xlabel("predicted effect", color=TEXT)
    axis.set_ylabel("real effect", color=TEXT)
    clean(axis)
    figure.tight_layout()
    return figure


def bar_figure(scores: PerturbationScores) -> Figure:
    """Draw a bar for the model's Pearson delta of each perturbation, marks for the best baselines and the ceiling."""
    order = np.argsort(-np.nansum(scores.real**2, 1), kind="stable")[:MOST_BARS][::-1]
    place = np.arange(len(order))
    figure = Figure(figsize=(WIDTH, 1.4 + 0.26 * len(order)))
    axis = figure.subplots()
    colours = {MODEL: COLOURS["generated"], **dict(zip(best_baselines(scores), _BASELINE_COLOURS, strict=False))}
    for row, colour in {**colours, CEILING: _CEILING_COLOUR}.items():
        values = scores.by_unit(row, _KEY)[order]
        if row == MODEL:
            axis.barh(place, values, color=colour, height=0.62, label=row)
        else:
            mark, size, edge = ("|", 9, 2) if row == CEILING else ("o", 5, 0)
            axis.plot(values, place, mark, color=colour, markersize=size, markeredgewidth=edge, label=row)
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.set_yticks(place, [scores.labels[at] for at in order])
    axis.set_xlabel(_metric(scores, _KEY).title, color=TEXT)
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    clean(axis)
    figure.tight_layout()
    return figure


def interval_figure(scores: PerturbationScores) -> Figure:
    """Draw mean and interval of every row, one panel per measure."""
    rows = list(scores.figures)[::-1]
    lines = -(-len(scores.metrics) // COLUMNS)
    figure = Figure(figsize=(WIDTH, lines * (0.7 + 0.19 * len(rows))))
    axes = figure.subplots(lines, COLUMNS, sharey=True).ravel()
    for axis in axes[len(scores.metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes, scores.metrics, strict=False):
        _intervals(axis, scores, metric.key, rows)
        axis.set_title(_title(metric), fontsize=9, color=TEXT, loc="left")
        clean(axis)
    figure.tight_layout()
    return figure


def _intervals(axis: Axes, scores: PerturbationScores, key: str, rows: list[str]) -> None:
    for place, row in enumerate(rows):
        if scores.has(row, key):
            real = row in (DUPLICATE, CEILING)
            colour = _CEILING_COLOUR if real else COLOURS["generated" if row == MODEL else "baseline"]
            axis.plot(scores.interval(row, key), (place, place), color=colour, linewidth=2)
            axis.plot(scores.mean(row, key), place, "o", color=colour, markersize=5)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(labelsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.4)


def _metric(scores: PerturbationScores, key: str) -> Metric[Any]:
    return next(metric for metric in scores.metrics if metric.key == key)


def _title(metric: Metric[Any]) -> str:
    return f"{metric.title} {ARROWS[metric.better]}"


def _meanings(scores: PerturbationScores) -> str:
    return " ".join(f"<b>{escape(m.title)}</b>: {escape(m.meaning)}" for m in scores.metrics)


def _table(scores: PerturbationScores, rows: Sequence[str]) -> str:
    """Return a table with a line per figure and a column per row of the scores."""
    head = "".join(f'<th class="number">{escape(row)}</th>' for row in rows)
    lines = []
    for metric in scores.metrics:
        cells = ""
        for row in rows:
            mean, _, interval = scores.cell(row, metric).partition("\n")
            shown = mean if not interval else f'{mean}<br><span class="sd">{interval.replace("..", " to ")}</span>'
            cells += f'<td class="number">{shown}</td>'
        lines.append(f"<tr><td>{escape(_title(metric))}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )
