"""The part of a report that says, condition by condition, whether what was asked for was delivered."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure

from bgen.evaluate.protocols.scores import LabelScore, NumberScore, Scores
from bgen.evaluate.reports.page import figure
from bgen.evaluate.reports.pictures import COLOURS, TEXT, clean

SHOWN = 40
"""Labels that a picture shows, those that agree least."""
WIDTH = 6.2  # inches: read on a telephone too
ROWS = {"model": ("generated", "o"), "baseline": ("baseline", "s"), "ceiling": ("real", "|")}


def condition_section(scores: Scores) -> list[str]:
    """Return the section as HTML parts; none where nothing was asked for."""
    if not scores.asked:
        return []
    parts = ["<h2>What was asked for</h2>", *(f"<p>{escape(sentence)}</p>" for sentence in scores.asked)]
    for name in dict.fromkeys(label.condition for label in scores.labels):
        own = [label for label in scores.labels if label.condition == name]
        parts.append(
            figure(
                agreement_figure(own),
                f"Agreement with each label of {name}",
                f"{name}: share of the cells of a label that a classifier trained on real cells takes for it, with the"
                " number of generated and of unseen real cells. Red: clearly less than of real cells.",
            )
        )
        far = [label for label in own if label.energy]
        if far:
            parts.append(
                figure(
                    energy_figure(far),
                    f"Energy distance within each label of {name}",
                    f"{name}: energy distance to real cells of the same label; about 0 is best.",
                )
            )
        parts.append(_label_table(own))
    for number in scores.numbers:
        parts.append(
            figure(
                number_figure(number),
                f"{number.condition}, asked and delivered",
                f"{number.condition}: asked for (across) and as read from the cells (up), generated and real.",
            )
        )
    return parts


def agreement_figure(labels: Sequence[LabelScore]) -> Figure:
    """Draw the share of agreement of each label, generated beside real."""
    shown = sorted(labels, key=lambda label: label.agreed / max(label.cells, 1))[:SHOWN][::-1]
    drawn = Figure(figsize=(WIDTH, 1.0 + 0.26 * len(shown)))
    axis = drawn.subplots()
    places = np.arange(len(shown))
    real = [label.agreed_real / label.cells_real if label.cells_real else np.nan for label in shown]
    made = [label.agreed / label.cells if label.cells else np.nan for label in shown]
    axis.scatter(real, places, marker="|", s=130, linewidths=2.5, color=COLOURS["real"], label="real")
    colours = ["#a31515" if label.missed else COLOURS["generated"] for label in shown]
    axis.scatter(made, places, s=34, color=colours, label="generated", zorder=3)
    names = [f"{label.label} ({label.cells}, {label.cells_real})" for label in shown]
    axis.set_yticks(places, [_short(name) for name in names])
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel("share that agrees", color=TEXT)
    axis.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    clean(axis)
    drawn.tight_layout()
    return drawn


def energy_figure(labels: Sequence[LabelScore]) -> Figure:
    """Draw the energy distance within each label, of all rows."""
    shown = sorted(labels, key=lambda label: -label.energy["model"])[:SHOWN][::-1]
    drawn = Figure(figsize=(WIDTH, 1.0 + 0.26 * len(shown)))
    axis = drawn.subplots()
    places = np.arange(len(shown))
    for row, (name, marker) in ROWS.items():
        size = {"o": 34, "s": 24, "|": 130}[marker]
        values = [label.energy[row] for label in shown]
        axis.scatter(values, places, marker=marker, s=size, color=COLOURS[name], label=name, zorder=3)
    axis.axvline(0, color="#cccccc", linewidth=1)
    axis.set_yticks(places, [_short(label.label) for label in shown])
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel("energy distance", color=TEXT)
    axis.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    clean(axis)
    drawn.tight_layout()
    return drawn


def number_figure(number: NumberScore) -> Figure:
    """Draw what was delivered against what was asked for."""
    drawn = Figure(figsize=(WIDTH, 3.6))
    axis = drawn.subplots()
    values = np.unique([*number.asked, *number.asked_real])
    # at a few times or doses, generated cells would lie on real ones
    aside = 0.15 * np.diff(values).min() if len(values) > 1 else 0.0
    for asked, told, side, name in (
        (number.asked_real, number.told_real, -aside, "real"),
        (number.asked, number.told, aside, "generated"),
    ):
        across = np.asarray(asked) + side
        axis.scatter(across, told, s=12, color=COLOURS[name], linewidths=0, alpha=0.6, label=name)
    axis.set_xlabel(f"{number.condition}, asked for", color=TEXT)
    axis.set_ylabel("delivered", color=TEXT)
    axis.legend(frameon=False, fontsize=9)
    clean(axis)
    drawn.tight_layout()
    return drawn


def _label_table(labels: Sequence[LabelScore]) -> str:
    """Return every label with its numbers, the clearly missed first."""
    rows = []
    for label in sorted(labels, key=lambda label: (label.p, label.cells)):
        energies = "".join(
            f'<td class="number">{label.energy[row]:z.3f}</td>' if label.energy else "<td></td>" for row in ROWS
        )
        mark = '<td class="verdict bad">not delivered</td>' if label.missed else "<td></td>"
        rows.append(
            f'<tr><td>{escape(label.label)}</td><td class="number">{label.agreed} of {label.cells}</td>'
            f'<td class="number">{label.agreed_real} of {label.cells_real}</td>{mark}{energies}</tr>'
        )
    agreement, energy = (
        "".join(f'<th class="number">{text}</th>' for text in texts)
        for texts in (("generated", "real"), ("energy", "baseline", "real"))
    )
    return (
        f'<div class="wide"><table><thead><tr><th>label</th>{agreement}<th></th>{energy}</tr></thead>'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:18] + "…" + name[-15:]
