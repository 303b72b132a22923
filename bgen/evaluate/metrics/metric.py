"""A metric: its name, which values are better, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Better = Literal["lower", "higher", "half", "one"]
"""Which values are better: half and one are the best values themselves."""

ARROWS: dict[Better, str] = {"lower": "↓", "higher": "↑", "half": "→½", "one": "→1"}

Evidence = TypeVar("Evidence", contravariant=True)
"""What a figure is computed from, such as two populations in an embedding."""


@dataclass(frozen=True)
class Metric(Generic[Evidence]):
    """One figure.

    Attributes
    ----------
    key
        Its name in files.
    title
        Its name for people.
    better
        Which values are better.
    digits
        Decimals to print.
    meaning
        What it says, in one sentence.
    compute
        From the evidence to the value.
    margin
        How much worse than real cells still counts as equal to them, in the figure's unit; 0: nothing does.
    relative
        The margin is a share of the ceiling's value instead: for distances whose unit is that of the embedding.
    erratic
        Single cells can decide the figure, as with variances of rare genes, so that its noise hardly shrinks from half
        of the cells to all of them: the error of halves counts in full.
    """

    key: str
    title: str
    better: Better
    digits: int
    meaning: str
    compute: Callable[[Evidence], float]
    margin: float = 0.0
    relative: bool = False
    erratic: bool = False


def shortfall(value: float, better: Better) -> float:
    """Return how far a value is from perfect (higher: from 1, the most that such a figure can be); lower is better."""
    if better == "lower":
        return value
    if better == "higher":
        return 1.0 - value
    return abs(value - (0.5 if better == "half" else 1.0))
