"""What a comparison of rows over seeds found, and what is said of it: helps, no difference, or hurts.

Each row is judged against another, its control, by figures of the same seed. A difference is one if its mean over seeds
is beyond three standard deviations of the seeds' differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import t as student

from bgen.arrays import F64

NOISE = 3.0
"""Standard deviations over seeds that a difference must exceed."""

TIME = "ms"
"""Key of the time that a row takes, which is told and not judged."""

LESS = ("NLL", "error")
"""How keys begin of which less is better."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Compared:
    """Figures of every row and seed.

    Attributes
    ----------
    title
        What was compared, on what.
    against
        Row to the row that it is judged against; to itself: it is not.
    runs
        Row to its figures, a dictionary for each seed; all have the same keys.
    facts
        What else is written.
    note
        What the figures are, in a sentence or two.
    """

    title: str
    against: Mapping[str, str]
    runs: Mapping[str, list[Figures]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(next(iter(self.runs.values())))

    def mean(self, row: str, key: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean([run[key] for run in self.runs[row]]))

    def verdict(self, row: str, key: str) -> str:
        """Say whether a row helps beside what it is judged against: better or worse by 3 sd of seeds, or neither."""
        against, gains = self.against[row], self._gains(row, key)
        if row == against or key == TIME or len(gains) < 2:
            return ""
        beyond = abs(gains.mean()) > NOISE * gains.std(ddof=1)
        return ("helps" if gains.mean() > 0 else "hurts") if beyond else "no difference"

    def _gains(self, row: str, key: str) -> F64:
        """Return how much better a row is than its control, at each seed."""
        pairs = zip(self.runs[row], self.runs[self.against[row]], strict=True)
        gains = np.array([a[key] - b[key] for a, b in pairs])
        return -gains if key.startswith(LESS) else gains

    def sentence(self, row: str) -> str:
        """Say in one sentence where a row helps and where it hurts."""
        found: dict[str, list[str]] = {"helps": [], "hurts": []}
        for key in self.keys:
            if (said := self.verdict(row, key)) in found:
                found[said].append(key)
        told = [f"{verb} in {', '.join(keys)}" for verb, keys in found.items() if keys]
        return f"{row}: {' and '.join(told) or 'no difference'} (against {self.against[row]})."

    def sentences(self) -> list[str]:
        """Return a sentence for every row that is judged."""
        return [self.sentence(row) for row, against in self.against.items() if row != against]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**self.facts, "against": dict(self.against), "runs": self.runs, "sentences": self.sentences()}

    @property
    def keys(self) -> list[str]:
        """What was measured."""
        return list(next(iter(self.runs.values()))[0])

    def cell(self, row: str, key: str) -> str:
        """Return a mean over seeds as text, with * where it is 3 sd away from what the row is judged against."""
        star = "*" if self.verdict(row, key) in ("helps", "hurts") else ""
        digits = 1 if key == TIME or key.startswith("NLL") else 3
        return f"{self.mean(row, key):,.{digits}f}{star}"

    def markdown(self) -> str:
        """Return the table and the sentences as a part of a page."""
        lines = [f"**{self.title}**", "", "| | " + " | ".join(self.keys) + " |", "|---|" + "---|" * len(self.keys)]
        lines += [f"| {row} | " + " | ".join(self.cell(row, key) for key in self.keys) + " |" for row in self.runs]
        lines += ["", self._caption(), "", *(f"- {sentence}" for sentence in self.sentences()), ""]
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Draw how far each row is from what it is judged against, in standard deviations of seeds: a .png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = [row for row, against in self.against.items() if row != against]
        keys = [key for key in self.keys if key != TIME]
        gains = np.array([[self._gain(row, key) for key in keys] for row in rows])
        height = max(1.6 + 0.34 * len(rows), 4.6)  # what the bar beside it is called needs some
        figure = Figure(figsize=(3 + 0.9 * len(keys), height), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(gains, cmap="RdBu", vmin=-6, vmax=6, aspect="auto")
        axes.set_xticks(range(len(keys)), keys, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        for at, row in enumerate(rows):
            for place, key in enumerate(keys):
                colour = "white" if abs(gains[at, place]) > 4 else "#222222"
                axes.text(place, at, self.cell(row, key), ha="center", va="center", fontsize=8, color=colour)
        axes.set_title(self.title, loc="left", fontsize=11)
        figure.colorbar(image, label="hurts (red) or helps (blue), in sd of seeds", shrink=0.8)
        FigureCanvasAgg(figure).print_png(str(path))

    def _gain(self, row: str, key: str) -> float:
        """Return a row's gain over its control in standard deviations of seeds, at most 6 either way; 0 at one seed."""
        gains = self._gains(row, key)
        spread = float(gains.std(ddof=1)) if len(gains) > 1 else np.inf
        return float(np.clip(gains.mean() / max(spread, 1e-12), -6, 6))

    def by_chance(self) -> float:
        """Return how many figures would be marked if no row differed from its control, and seeds were normal."""
        judged = sum(row != against for row, against in self.against.items()) * len(set(self.keys) - {TIME})
        return judged * 2 * float(student.sf(NOISE * np.sqrt(self.seeds), self.seeds - 1)) if self.seeds > 1 else 0.0

    def _caption(self) -> str:
        chance = f" Chance alone marks about {self.by_chance():.1f} of them." if self.seeds > 1 else ""
        return f"Means over {self.seeds} seeds; * differs by over {NOISE:g} sd.{chance} {self.note}"

    def table(self) -> Table:
        """Return all figures as means over seeds; * where 3 sd away from what the row is judged against."""
        table = Table(
            title=self.title,
            caption=self._caption(),
            box=None,
            pad_edge=False,
        )
        for heading in ("", *self.keys):
            table.add_column(heading, justify="left" if not heading else "right")
        for row in self.runs:
            table.add_row(row, *(self.cell(row, key) for key in self.keys))
        return table
