"""One self-contained HTML page that says how good generated cells are: sentence, table, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from anndata import AnnData

from bgen.evaluate.metrics.metric import ARROWS
from bgen.evaluate.protocols.scores import ROWS, Score, Scores
from bgen.evaluate.reports import pictures
from bgen.evaluate.reports.conditions import condition_section
from bgen.evaluate.reports.page import facts_table, figure, write_page

_CLASSES = {
    "cannot tell": "even",
    "at the ceiling": "best",
    "better than the baseline": "good",
    "no better than the baseline": "even",
    "worse than the baseline": "bad",
}
_MARKS = pictures.ROW_COLOURS
_TITLES = {"real": "real cells, held out", "generated": "generated", "baseline": "baseline"}


def write_report(
    path: str | Path,
    scores: Scores,
    train: AnnData,
    test: AnnData,
    generated: AnnData,
    baseline: AnnData,
    *,
    losses: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    title: str = "How good are the generated cells?",
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write the page, whole or not at all, and return its path.

    Parameters
    ----------
    scores
        From :func:`bgen.evaluate.protocols.distribution.evaluate`; its ``cell_type`` names the column that colours the
        cells.
    train, test, generated, baseline
        Raw counts over the same genes; ``baseline`` from :func:`bgen.evaluate.protocols.distribution.baseline_cells`.
    losses
        Rows of each training record by the name of the stage, in order.
    provenance
        Facts for the foot of the page, such as model, data and version.
    """
    column = scores.setting.get("cell_type")
    cell_type = column if isinstance(column, str) else None
    sets = pictures.read_sets({"train": train, "real": test, "generated": generated, "baseline": baseline}, cell_type)
    panels = pictures.joint_layout(sets)
    parts = [f'<p class="note">{escape(note)}</p>' for note in scores.notes]
    if scores.copied is not None:
        parts.append(f'<p class="{"note" if scores.copied.found else "small"}">{escape(scores.copied.sentence())}</p>')
    parts += condition_section(scores)
    parts += [_score_section(scores)]
    coloured = f"Colour is {cell_type}. " if cell_type else ""
    parts += [
        "<h2>The cells, side by side</h2>",
        figure(
            pictures.embedding_figure(panels, _TITLES),
            "Real, generated and baseline cells in one map",
            f"{coloured}{len(panels[0].xy):,} cells each, on one map: t-SNE of all of them together, from the "
            "principal components of the training cells. Real cells are light grey behind the "
            "others: grey without colour is missed, colour without grey invented. Gaps between islands mean little.",
        ),
        "<h2>Noise of each gene</h2>",
        figure(
            pictures.mean_variance_figure(sets),
            "Variance against mean of each gene",
            "One dot a gene, over equally many cells; real ones grey. Lines are medians. Counting alone would give the "
            "dotted line; what lies above it is variation between cells.",
        ),
        "<h2>Library size and zeros</h2>",
        figure(
            pictures.histogram_figure(sets),
            "Histograms of counts per cell, genes per cell and zeros per gene",
            "Grey is real. The share of zeros is per gene, with a logarithmic axis.",
        ),
    ]
    curves = pictures.loss_figure(losses) if losses else None
    if curves is not None:
        caption = "Mean over the steps between records (train), and over held-out cells. The first tenth may lie above."
        parts += ["<h2>Training</h2>", figure(curves, "Loss against step", caption)]
    parts += [facts_table(_facts(scores) | dict(provenance or {}))]
    return write_page(path, title, scores.headline(), parts)


def _score_section(scores: Scores) -> str:
    keys = {
        "model": "the generated cells",
        "baseline": "cells drawn from a negative binomial around each of 50 clusters, genes independent: what is easy",
        "ceiling": "other real cells in place of generated ones: what is possible",
    }
    legend = "; ".join(f"{_dot(row)}<b>{row}</b>: {meaning}" for row, meaning in keys.items())
    head = "".join(f'<th class="number">{_dot(row)}{row}</th>' for row in ROWS)
    rows = "\n".join(_score_row(score) for score in scores.scores)
    return f"""<h2>Scores</h2>
<p>Every row compares {scores.cells:,} cells with {scores.cells:,} held-out real cells. {legend}.</p>
<div class="wide"><table>
<thead><tr><th>measure</th>{head}<th class="strip">worse … better</th><th>verdict</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p class="small">Mean <span class="sd">± standard deviation</span> of {scores.subsamples} subsamples. ↓ lower is better,
↑ higher is better, →½ one half is best. <b>At the ceiling</b>: as good as other real cells, within the margin of the
measure, while the baseline is not. <b>Better, worse</b>: clearly another figure than the baseline's. <b>Cannot
tell</b>: neither is sure, or the baseline is as good as real cells too. {len(scores.scores)} measures are judged, each
wrong in at most 5 %: among so many, one or another may be.</p>"""


def _score_row(score: Score) -> str:
    digits = score.metric.digits
    numbers = "".join(
        f'<td class="number">{getattr(score, row).mean:z.{digits}f} '
        f'<span class="sd">±{getattr(score, row).sd:.{digits}f}</span></td>'
        for row in ROWS
    )
    name = f"{escape(score.metric.title)} {ARROWS[score.metric.better]}"
    verdict = score.verdict
    return (
        f'<tr><td>{name}<span class="meaning">{escape(score.metric.meaning)}</span></td>{numbers}'
        f'<td class="strip">{strip(score)}</td>'
        f'<td class="verdict {_CLASSES[verdict]}">{verdict}{_reason(score)}</td></tr>'
    )


def _reason(score: Score) -> str:
    """Return what else is known where the verdict alone would leave the reader to guess."""
    told = score.judgement
    if told is None:
        return ""
    if told.equivalent and told.easy:
        words = "as good as real cells, and so is the baseline"
    elif told.differs:
        words = "clearly worse than real cells"
    else:
        return ""
    return f'<span class="meaning">{words}</span>'


def strip(score: Score) -> str:
    """Return a small drawing of the three figures on one line, the best at the right end."""
    x = {row: 8 + 94 * place for row, place in score.places.items()}
    return (
        '<svg width="110" height="18" role="img" aria-label="position of model between baseline and ceiling">'
        '<line x1="8" y1="9" x2="102" y2="9" stroke="#dddddd" stroke-width="2"/>'
        f'<rect x="{x["ceiling"] - 1.5:.1f}" y="1" width="3" height="16" fill="{_MARKS["ceiling"]}"/>'
        f'<circle cx="{x["baseline"]:.1f}" cy="9" r="5.5" fill="{_MARKS["baseline"]}"/>'
        f'<circle cx="{x["model"]:.1f}" cy="9" r="4.5" fill="{_MARKS["model"]}" stroke="#fff"/></svg>'
    )


def _facts(scores: Scores) -> dict[str, object]:
    facts: dict[str, object] = {"protocol": scores.protocol, "cells on each side": scores.cells}
    return facts | {key.replace("_", " "): value for key, value in scores.setting.items() if value is not None}


def _dot(row: str) -> str:
    return f'<span class="key" style="background:{_MARKS[row]}"></span>'
