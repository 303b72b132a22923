"""What was done to each cell of a screen: the set of perturbations and the dose.

Axes: N cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.effects.contexts import Key
from bgen.tasks.perturb.screen import Columns, read_doses
from data_tools.check.labels import JOIN

DOSE = "@"
"""Between a label and its dose: "dex@10"."""


@dataclass(frozen=True)
class ScreenKeys:
    """The key of every cell: ``distinct`` keys, of which ``number [N]`` says which each cell has."""

    distinct: list[Key]
    number: I64
    control: Key

    def rows(self, key: Key) -> I64:
        """Return the numbers of the cells of a key, ascending."""
        if key not in self.distinct:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.number == self.distinct.index(key)).astype(np.int64)

    def where(self, holds: Callable[[Key], bool]) -> NDArray[np.bool_]:
        """Return for which cells ``[N]`` something holds of their key."""
        return np.array([holds(key) for key in self.distinct], bool)[self.number]

    def perturbed(self) -> dict[Key, I64]:
        """Return the numbers of the cells of every set and dose, without control cells and cells without a label."""
        order = np.argsort(self.number, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(self.number, minlength=len(self.distinct)))[:-1])
        of_keys = zip(self.distinct, parts, strict=True)
        return {key: rows.astype(np.int64) for key, rows in of_keys if key[0] and key != self.control}


def screen_keys(adata: AnnData, columns: Columns) -> ScreenKeys:
    """Return the set and dose of every cell; controls, ``columns.control_key``, have no dose.

    Keys are in the order of the cells. What a label means is looked up once per label and dose, not per cell.
    """
    label = columns.labels(adata)
    doses, control = read_doses(adata, columns, label), columns.is_control(label)
    table = pd.DataFrame({"label": label, "dose": doses, "control": control})
    number = table.groupby(["label", "dose", "control"], dropna=False, sort=False).ngroup().to_numpy()
    _, firsts = np.unique(number, return_index=True)
    place: dict[Key, int] = {}
    of_group = [
        place.setdefault(
            columns.control_key
            if control[row]
            else (columns.grammar.members(str(label[row])), None if np.isnan(doses[row]) else float(doses[row])),
            len(place),
        )
        for row in firsts
    ]
    return ScreenKeys(list(place), np.array(of_group, np.int64)[number], columns.control_key)


def named(key: Key) -> str:
    """Return a set and its dose as text."""
    return JOIN.join(key[0]) if key[1] is None else f"{JOIN.join(key[0])}{DOSE}{key[1]:g}"
