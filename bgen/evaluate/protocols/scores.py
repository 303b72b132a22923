"""Scores of a protocol: each figure of the model between a baseline and a ceiling, with a verdict in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from bgen.errors import UserError
from bgen.evaluate.metrics.memorisation import Memorisation
from bgen.evaluate.metrics.metric import ARROWS, Better, Metric, shortfall
from bgen.evaluate.protocols.verdicts import ROWS, Errors, Judgement, judge
from bgen.files import write_result
from bgen.notebooks import as_html

SHORT = {
    "at the ceiling": "at the ceiling",
    "better than the baseline": "better",
    "no better than the baseline": "no better",
    "worse than the baseline": "worse",
    "cannot tell": "cannot tell",
}
"""Verdicts in a narrow table, those of older protocols among them."""
STYLES = {
    "at the ceiling": "bold green",
    "better than the baseline": "green",
    "no better than the baseline": "yellow",
    "worse than the baseline": "red",
    "cannot tell": "yellow",
}
NAMED = 5
"""Measures or labels that a sentence names, at most."""


@dataclass(frozen=True)
class Estimate:
    """A figure over several subsamples."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the subsamples."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """Standard deviation over the subsamples (denominator n - 1)."""
        return float(np.std(self.values, ddof=1))

    def shortfall(self, better: Better) -> Estimate:
        """Return the same figure as a distance from perfect, so that lower is better."""
        return Estimate(tuple(shortfall(value, better) for value in self.values))


@dataclass(frozen=True)
class Score:
    """One metric of the model, of the baseline, and of real cells (the ceiling).

    Attributes
    ----------
    errors
        Of the differences between rows; without them no verdict is possible.
    said
        The verdict that a file of an older protocol holds.
    """

    metric: Metric[Any]
    model: Estimate
    baseline: Estimate
    ceiling: Estimate
    errors: Errors | None = None
    said: str | None = None

    @property
    def margin(self) -> float:
        """How much worse than real cells still counts as equal to them."""
        scale = abs(self.ceiling.shortfall(self.metric.better).mean) if self.metric.relative else 1.0
        return self.metric.margin * scale

    @property
    def judgement(self) -> Judgement | None:
        """What can be said, if the errors are known."""
        if self.errors is None:
            return None
        model, baseline, ceiling = (getattr(self, row).shortfall(self.metric.better).mean for row in ROWS)
        return judge(model, baseline, ceiling, self.errors, self.margin)

    @property
    def verdict(self) -> str:
        """A :data:`bgen.evaluate.protocols.verdicts.Verdict`, or what an older protocol said."""
        if self.said is not None:
            return self.said
        return "cannot tell" if self.judgement is None else self.judgement.verdict

    @property
    def places(self) -> dict[str, float]:
        """Where each row lies between the worst of them at 0 and the best at 1; all at 1 where they are equal."""
        short = {row: getattr(self, row).shortfall(self.metric.better).mean for row in ROWS}
        width = max(short.values()) - min(short.values())
        return {row: 1.0 - (value - min(short.values())) / (width or 1.0) for row, value in short.items()}

    def cell(self, row: str) -> str:
        """Return ``mean±sd`` of a row for printing."""
        estimate: Estimate = getattr(self, row)
        return f"{estimate.mean:z.{self.metric.digits}f}±{estimate.sd:.{self.metric.digits}f}"

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        told = self.judgement
        return {
            "title": self.metric.title,
            "better": self.metric.better,
            "digits": self.metric.digits,
            **{row: _estimate_json(getattr(self, row)) for row in ROWS},
            "margin": self.margin,
            "errors": None if self.errors is None else asdict(self.errors),
            "verdict": self.verdict,
            **({} if told is None else {"equivalent": told.equivalent, "baseline_equivalent": told.easy}),
        }


@dataclass(frozen=True)
class LabelScore:
    """One label of a condition, however few cells it has.

    Attributes
    ----------
    condition, label
        Column and value.
    agreed, cells
        Generated cells that a classifier trained on real cells takes for the label, of how many.
    agreed_real, cells_real
        The same of unseen real cells.
    p
        Probability of as little agreement if generated cells agreed as real ones do (Fisher), times the number of
        labels.
    energy, w2
        Distances within the label, of model, baseline and ceiling; empty where there are too few cells.
    """

    condition: str
    label: str
    agreed: int
    cells: int
    agreed_real: int
    cells_real: int
    p: float
    energy: dict[str, float] = field(default_factory=dict)
    w2: dict[str, float] = field(default_factory=dict)

    @property
    def missed(self) -> bool:
        """Whether what was delivered is clearly not what was asked for."""
        return self.p < 0.05

    @property
    def words(self) -> str:
        """The label with its numbers."""
        return f"{self.label} ({self.agreed} of {self.cells}; of real cells {self.agreed_real} of {self.cells_real})"


@dataclass(frozen=True)
class NumberScore:
    """Some cells of a numeric condition: what was asked for and what was delivered, of generated and of real cells."""

    condition: str
    asked: tuple[float, ...]
    told: tuple[float, ...]
    asked_real: tuple[float, ...]
    told_real: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """The result of one protocol.

    Attributes
    ----------
    cells
        On each side of every comparison.
    subsamples
        Seeds.
    setting
        What else fixes the figures: genes, components, sizes of the sets.
    notes
        What the reader must know to judge them.
    labels
        Every label of every condition that was asked for.
    numbers
        Some cells of every numeric condition.
    asked
        What was asked for and whether it was delivered, a sentence for each condition.
    copied
        Whether training cells are repeated.
    told
        The headline of a file of an older protocol.
    """

    protocol: str
    cells: int
    subsamples: int
    setting: dict[str, int | float | str | None]
    scores: tuple[Score, ...]
    notes: tuple[str, ...] = field(default=())
    labels: tuple[LabelScore, ...] = field(default=())
    numbers: tuple[NumberScore, ...] = field(default=())
    asked: tuple[str, ...] = field(default=())
    copied: Memorisation | None = None
    told: str | None = None

    def __getitem__(self, key: str) -> Score:
        for score in self.scores:
            if score.metric.key == key:
                return score
        raise KeyError(key)

    def means(self) -> dict[str, float]:
        """Return the mean of every figure under ``metric/row``, for trackers."""
        return {f"{score.metric.key}/{row}": getattr(score, row).mean for score in self.scores for row in ROWS}

    def headline(self) -> str:
        """Return what one would quote: what was asked for, whether cells are copied, and how many measures say what."""
        if self.told is not None:
            return self.told
        # of each sentence what comes before its figures; labels, which may hold anything, come before them
        clauses = [sentence.rpartition(": ")[0] or sentence.rstrip(".") for sentence in self.asked]
        sentences = []
        if clauses:
            sentences.append("; ".join([clauses[0], *(clause.removeprefix("Asked ") for clause in clauses[1:])]) + ".")
        if self.copied is not None and self.copied.found:
            sentences.append(self.copied.sentence())
        return " ".join([*sentences, self._counted()])

    def _counted(self) -> str:
        found = [(score, score.judgement) for score in self.scores]
        total = len(found)
        equal = sum(j is not None and j.equivalent for _, j in found)
        easy = sum(j is not None and j.easy for _, j in found)
        better = sum(score.verdict == "better than the baseline" and not (j and j.equivalent) for score, j in found)
        below = [score.metric.title for score, j in found if j is not None and j.differs]
        parts = [f"as good as unseen real cells in {equal} of {total} measures (the baseline: in {easy})"]
        parts += [f"better than the baseline in {better} more"] if better else []
        parts += [f"clearly worse than real cells in {len(below)} ({_some(below)})"] if below else []
        return f"Generated cells are {_listed(parts)}."

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "protocol": self.protocol,
            "headline": self.headline(),
            "cells": self.cells,
            "subsamples": self.subsamples,
            "comparisons": len(self.scores),
            "setting": dict(self.setting),
            "metrics": {score.metric.key: score.as_json() for score in self.scores},
            "asked": list(self.asked),
            "labels": [asdict(label) for label in self.labels],
            "numbers": [
                {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(n).items()} for n in self.numbers
            ],
            "memorisation": None if self.copied is None else self.copied.as_json(),
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`as_json` to a file (usually ``metrics.json``), whole or not at all."""
        write_result(Path(path), json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Scores:
        """Return the scores that :meth:`as_json` gave, of this or of an older protocol.

        A file of ``distribution-v1`` has no errors: its verdicts and its headline are taken as they stand.

        Raises
        ------
        UserError
            If these are no scores of generated cells.
        """
        try:
            scores = tuple(_score(key, entry) for key, entry in told["metrics"].items())
            old = all(score.errors is None for score in scores)
            copied = told.get("memorisation")
            return cls(
                protocol=told["protocol"],
                cells=told["cells"],
                subsamples=told["subsamples"],
                setting=dict(told["setting"]),
                scores=scores,
                notes=tuple(told["notes"]),
                labels=tuple(LabelScore(**label) for label in told.get("labels", ())),
                numbers=tuple(
                    NumberScore(
                        number["condition"],
                        *(tuple(number[what]) for what in ("asked", "told", "asked_real", "told_real")),
                    )
                    for number in told.get("numbers", ())
                ),
                asked=tuple(told.get("asked", ())),
                copied=None if copied is None else Memorisation.from_json(copied),
                told=told["headline"] if old else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"These are no scores of generated cells: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a ``metrics.json``; see :meth:`from_json`."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    def _repr_html_(self) -> str:
        return as_html(self.headline(), self.table())

    def table(self) -> Table:
        """Return a table that fits a terminal of 80 columns."""
        caption = (
            f"{self.cells:,} cells on each side, mean±sd of {self.subsamples} subsamples. baseline: negative binomial "
            f"per cluster; ceiling: real against real. {len(self.scores)} comparisons, each wrong in at most 5 %."
        )
        table = Table(
            title=f"Scores ({self.protocol})", caption=caption, box=None, collapse_padding=True, pad_edge=False
        )
        table.add_column("measure")
        for row in ROWS:
            table.add_column(row, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for score in self.scores:
            verdict = score.verdict
            cells = [score.cell(row) for row in ROWS]
            mark = Text(SHORT[verdict], style=STYLES[verdict])
            table.add_row(f"{score.metric.title} {ARROWS[score.metric.better]}", *cells, mark)
        return table


def _score(key: str, entry: Mapping[str, Any]) -> Score:
    """Return one metric of a file; its function is not kept there."""

    def again(_: object) -> float:
        raise ValueError(f"'{key}' was read from a file and cannot be computed from it")

    metric = Metric(key, entry["title"], entry["better"], entry.get("digits", 3), "", again, entry.get("margin", 0.0))
    errors = entry.get("errors")
    model, baseline, ceiling = (Estimate(tuple(entry[row]["values"])) for row in ROWS)
    if errors is None:
        return Score(metric, model, baseline, ceiling, said=entry["verdict"])
    return Score(metric, model, baseline, ceiling, Errors(**errors))


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "sd": estimate.sd, "values": list(estimate.values)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
