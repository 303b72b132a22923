"""One self-contained HTML page about predicted perturbations: words, table, and three pictures.

Axes: P perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bgen.evaluate.metrics.metric import ARROWS, Metric
from bgen.evaluate.protocols.perturbation import CEILING, CONTROL_COPY, MODEL, PerturbationScores
from bgen.evaluate.reports.page import facts_table, figure, write_page
from bgen.evaluate.reports.pictures import COLOURS, TEXT, WIDTH, clean

MOST_BARS = 30
_CEILING_COLOUR = "#222222"
_BASELINE_COLOURS = (COLOURS["baseline"], "#CC79A7", "#009E73", "#56B4E9", "#F0E442")


def write_perturbation_report(
    path: str | Path,
    scores: PerturbationScores,
    *,
    title: str = "How good are the predicted perturbations?",
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write the page, whole or not at all, and return its path; ``provenance`` are facts for its foot."""
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in scores.sentences())
    low, high = scores.interval(MODEL, "slope")
    shown = min(len(scores.labels), MOST_BARS)
    which = "all" if shown == len(scores.labels) else f"the {shown} with the largest real effects of"
    parts = [
        f"<ul>{words}</ul>",
        _table(scores),
        "<h2>Every figure, with its interval</h2>",
        figure(
            interval_figure(scores),
            "Means with intervals of the model, the baselines and the ceiling",
            "Dots are means, lines 95 % intervals (bootstrap over perturbations). Blue: the model. Black: other real"
            " cells of the same perturbation, which is what is possible.",
        ),
        "<h2>Effects on genes</h2>",
        figure(
            effect_figure(scores),
            "Predicted against real effect of each gene",
            "A dot is a gene under a perturbation: difference of mean log(1 + counts per 10,000) to the control cells."
            f" Dashed: as large as real. Line: the slope, {scores.mean(MODEL, 'slope'):.2f} ({low:.2f} to {high:.2f}),"
            " which is freed of the sampling noise of the real effects.",
        ),
        "<h2>Each perturbation</h2>",
        figure(
            bar_figure(scores),
            "Pearson delta of each perturbation",
            f"Correlation over genes of predicted and real effects, {which} {len(scores.labels)} perturbations, the"
            " largest real effect on top. Real effects are noisy, too: the ceiling is the correlation of two halves.",
        ),
        facts_table({"protocol": scores.protocol, "perturbations": len(scores.labels), **(provenance or {})}),
    ]
    mean = {row: scores.mean(row, "pearson") for row in (MODEL, CEILING)}
    headline = (
        f"Predicted and real effects correlate by {mean[MODEL]:.2f} over genes, two halves of the real cells by"
        f" {mean[CEILING]:.2f}."
    )
    return write_page(path, title, headline, parts)


def effect_figure(scores: PerturbationScores) -> Figure:
    """Draw the predicted against the real effect of every gene under every perturbation, and the slope."""
    figure = Figure(figsize=(0.62 * WIDTH, 4.6))
    axis = figure.subplots()
    limit = 1.05 * max(float(np.abs(scores.real).max()), float(np.abs(scores.predicted).max()), 1e-3)
    ends = np.array([-limit, limit])
    axis.scatter(
        scores.real.ravel(), scores.predicted.ravel(), s=5, color=COLOURS["generated"], alpha=0.35, linewidths=0,
        rasterized=True,
    )  # fmt: skip
    axis.plot(ends, ends, "--", color="#999999", linewidth=1)
    axis.plot(ends, scores.mean(MODEL, "slope") * ends, color=_CEILING_COLOUR, linewidth=1.2)
    axis.set(xlim=ends, ylim=ends)
    axis.set_xlabel("real effect", color=TEXT)
    axis.set_ylabel("predicted effect", color=TEXT)
    clean(axis)
    figure.tight_layout()
    return figure


def bar_figure(scores: PerturbationScores) -> Figure:
    """Draw a bar for the model's Pearson delta of each perturbation, marks for baselines and ceiling."""
    order = np.argsort(-(scores.real**2).sum(1), kind="stable")[:MOST_BARS][::-1]
    place = np.arange(len(order))
    figure = Figure(figsize=(WIDTH, 1.4 + 0.26 * len(order)))
    axis = figure.subplots()
    colours = {row: colour for row, colour in _colours(scores).items() if row != CONTROL_COPY}
    for row, colour in colours.items():
        values = scores.values[row]["pearson"].mean(0)[order]
        if row == MODEL:
            axis.barh(place, values, color=colour, height=0.62, label=row)
        else:
            mark, size, edge = ("|", 9, 2) if row == CEILING else ("o", 5, 0)
            axis.plot(values, place, mark, color=colour, markersize=size, markeredgewidth=edge, label=row)
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.set_yticks(place, [scores.labels[at] for at in order])
    axis.set_xlabel("Pearson delta", color=TEXT)
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(scores.values))
    clean(axis)
    figure.tight_layout()
    return figure


def interval_figure(scores: PerturbationScores) -> Figure:
    """Draw mean and interval of every row, one panel per measure."""
    rows = list(scores.values)[::-1]
    figure = Figure(figsize=(WIDTH, 1.6 + 0.5 * len(rows)))
    axes = figure.subplots(2, -(-len(scores.metrics) // 2), sharey=True).ravel()
    for axis in axes[len(scores.metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes, scores.metrics, strict=False):
        _intervals(axis, scores, metric.key, rows)
        axis.set_title(_title(metric), fontsize=10, color=TEXT, loc="left")
        clean(axis)
    figure.tight_layout()
    return figure


def _intervals(axis: Axes, scores: PerturbationScores, key: str, rows: list[str]) -> None:
    colours = _colours(scores)
    for place, row in enumerate(rows):
        if np.isfinite(scores.values[row][key]).any():
            axis.plot(scores.interval(row, key), (place, place), color=colours[row], linewidth=2)
            axis.plot(scores.mean(row, key), place, "o", color=colours[row], markersize=6)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(-0.6, len(rows) - 0.4)


def _colours(scores: PerturbationScores) -> dict[str, str]:
    """Return a colour per row: the model's is that of generated cells everywhere."""
    baselines = [row for row in scores.values if row not in (MODEL, CEILING)]
    others = {row: _BASELINE_COLOURS[at % len(_BASELINE_COLOURS)] for at, row in enumerate(baselines)}
    return {MODEL: COLOURS["generated"], **others, CEILING: _CEILING_COLOUR}


def _title(metric: Metric[Any]) -> str:
    return f"{metric.title} {ARROWS[metric.better]}"


def _table(scores: PerturbationScores) -> str:
    head = "".join(f'<th class="number">{escape(_title(m))}</th>' for m in scores.metrics)
    lines = []
    for row in scores.values:
        cells = ""
        for metric in scores.metrics:
            shown = "-"
            if np.isfinite(scores.values[row][metric.key]).any():
                low, high = scores.interval(row, metric.key)
                digits = metric.digits
                shown = (
                    f"{scores.mean(row, metric.key):.{digits}f}"
                    f' <span class="sd">{low:.{digits}f} to {high:.{digits}f}</span>'
                )
            cells += f'<td class="number">{shown}</td>'
        lines.append(f"<tr><td>{escape(row)}</td>{cells}</tr>")
    meanings = " ".join(f"<b>{escape(m.title)}</b>: {escape(m.meaning)}" for m in scores.metrics)
    return (
        f'<h2>Scores</h2><div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="small">{meanings}</p>'
    )
