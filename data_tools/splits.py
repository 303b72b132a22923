"""Which cells are for training, the held-out loss and testing: seeded; by groups where cells are not independent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bgen.config.errors import UserError
from bgen.data.keys import permutation

DEFAULT = {"train": 0.8, "valid": 0.1, "test": 0.1}


def parse_splits(text: str) -> dict[str, float]:
    """Read ``train=0.8,valid=0.1,test=0.1``.

    Raises
    ------
    UserError
        If it is of another form, or the fractions do not add up to 1.
    """
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        try:
            splits[name] = float(value)
        except ValueError:
            sign = ""
        if not sign or not name or splits[name] < 0:
            raise UserError(f"'{text}' does not describe splits: write train=0.8,valid=0.1,test=0.1.")
    if abs(sum(splits.values()) - 1) > 1e-6:
        raise UserError(f"The fractions of the splits '{text}' add up to {sum(splits.values()):g}, not to 1.")
    return splits


def assign(splits: Mapping[str, float], groups: NDArray[Any] | None, n_cells: int, seed: int) -> NDArray[np.uint8]:
    """Return the code of the split of each cell.

    Parameters
    ----------
    splits
        Name to fraction.
    groups
        ``[n_cells]``: cells of one group stay together; None: each cell by itself.
    seed
        Seed of the draw.

    Raises
    ------
    UserError
        If there are fewer groups than splits.
    """
    fractions = np.array(list(splits.values()))
    if groups is None:
        edges = np.round(np.cumsum(fractions) * n_cells).astype(np.int64)
        codes = np.searchsorted(edges, np.arange(n_cells), side="right").clip(max=len(splits) - 1)
        line = np.empty(n_cells, np.uint8)
        line[permutation(n_cells, seed)] = codes
        return line
    names, group = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    wanted = int((fractions > 0).sum())
    if len(names) < wanted:
        raise UserError(f"{wanted} splits need at least {wanted} groups; the column has {len(names)}.")
    sizes = np.bincount(group).astype(np.float64)
    room = fractions * n_cells
    chosen = np.zeros(len(names), np.uint8)
    for number in permutation(len(names), seed):  # each group goes where most room is left, in a random order
        chosen[number] = int(np.argmax(room))
        room[chosen[number]] -= sizes[number]
    return chosen[group]
