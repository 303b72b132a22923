"""Which cells are for training, the held-out loss and testing: drawn by seed, in groups where cells depend on each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bgen.errors import UserError, nearest
from bgen.order.groups import parts
from bgen.order.keys import hash_keys, permutation

DEFAULT = {"train": 0.8, "valid": 0.1, "test": 0.1}

Codes = NDArray[np.uint8]
"""[n_cells]: place of each cell's split among the splits."""


def group_names(values: pd.Series) -> NDArray[Any]:
    """Return the values of a column as texts: numbers without a decimal point where they are whole."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return np.array([f"{value:g}" for value in values.to_numpy(np.float64, na_value=np.nan)], dtype=object)
    return values.astype(str).to_numpy(object)


def assign(splits: Mapping[str, float], groups: NDArray[Any] | None, n_cells: int, seed: int) -> Codes:
    """Return the code of the split of each cell, drawn at random.

    Parameters
    ----------
    splits
        Name to fraction.
    groups
        ``[n_cells]``: cells of one group stay together; None: each cell by itself.
    seed
        Seed of the draw.

    Returns
    -------
    Codes
        Every split with a fraction above 0 has a group: where the draw leaves one without, since the groups are larger
        than its fraction, it gets the smallest group of a split that has several.

    Raises
    ------
    UserError
        If there are fewer groups than splits.
    """
    fractions = np.array(list(splits.values()))
    if groups is None:
        edges = np.round(np.cumsum(fractions) * n_cells).astype(np.int64)
        return _cut(n_cells, edges[edges < n_cells], seed).clip(max=len(splits) - 1)
    names, group = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    wanted = int((fractions > 0).sum())
    if len(names) < wanted:
        raise UserError(f"{wanted} splits need at least {wanted} groups; the column has {len(names)}.")
    sizes = np.bincount(group).astype(np.float64)
    room = fractions * n_cells
    chosen = np.zeros(len(names), np.uint8)
    drawn = permutation(len(names), seed)
    for number in drawn:  # each group goes where most room is left, in a random order
        chosen[number] = int(np.argmax(room))
        room[chosen[number]] -= sizes[number]
    for code in np.flatnonzero(fractions > 0):
        if not (chosen == code).any():
            several = drawn[np.bincount(chosen, minlength=len(splits))[chosen[drawn]] > 1]
            chosen[several[np.argmin(sizes[several])]] = code
    return chosen[group]


def _cut(n: int, edges: NDArray[np.int64], seed: int) -> Codes:
    """Return how many of the ascending ``edges`` are at or below the place of each of ``n`` cells in a random order.

    The order is that of :func:`bgen.order.keys.permutation`, whose keys are all different: the key at an edge tells on
    which side of it a cell is, so that cells are not sorted.
    """
    keys = np.empty(n, np.uint64)
    for part in parts(n):
        keys[part] = hash_keys(seed, np.arange(part.start, part.stop))
    if len(edges):
        keys.partition(np.unique(edges))
    at_edges = keys[edges]
    del keys
    line = np.empty(n, np.uint8)
    for part in parts(n):
        line[part] = np.searchsorted(at_edges, hash_keys(seed, np.arange(part.start, part.stop)), side="right")
    return line


def assign_groups(
    splits: Mapping[str, float],
    groups: NDArray[Any],
    seed: int,
    *,
    held_out: Mapping[str, Sequence[str]],
    spread: str | None = None,
) -> Codes:
    """Return the code of the split of each cell, where no group of cells may be in two splits.

    Parameters
    ----------
    splits
        Name to fraction.
    groups
        ``[n_cells]`` texts: donors, perturbations, time points.
    seed
        Seed of the draws.
    held_out
        Split to the groups that it consists of. All other cells are divided, each by itself, among the other splits in
        the proportions of their fractions. Empty: every group goes to one split, drawn at random.
    spread
        A group that is divided cell by cell among all splits: the control, which every split is compared with.

    Raises
    ------
    UserError
        If ``held_out`` names a group that is not there, or one twice, or leaves no split for the other cells.
    """
    codes = np.zeros(len(groups), np.uint8)
    alone = groups == spread if spread is not None else np.zeros(len(groups), bool)
    if not held_out:
        codes[~alone] = assign(splits, groups[~alone], int((~alone).sum()), seed)
    else:
        _check_held_out(held_out, splits, groups, spread)
        rest = {name: 0.0 if name in held_out else fraction for name, fraction in splits.items()}
        total = sum(rest.values())
        others = ~alone & ~np.isin(groups, [value for values in held_out.values() for value in values])
        if others.any():
            if total == 0:
                raise UserError("Every split holds out values by name: none is left for the other cells.")
            shares = {name: fraction / total for name, fraction in rest.items()}
            codes[others] = assign(shares, None, int(others.sum()), seed)
        for name, values in held_out.items():
            codes[np.isin(groups, list(values))] = list(splits).index(name)
    if alone.any():
        codes[alone] = assign(splits, None, int(alone.sum()), seed + 1)
    return codes


def require_cells(splits: Mapping[str, float], codes: Codes) -> None:
    """Check that every split that is to have cells has some.

    Raises
    ------
    UserError
        Naming one that has none.
    """
    for code, (name, fraction) in enumerate(splits.items()):
        if fraction > 0 and not (codes == code).any():
            raise UserError(
                f"The split '{name}' would hold no cell: it is to have {fraction:.3g} of {len(codes):,} cells. Give it"
                " a larger share, or leave it out."
            )


def _check_held_out(
    held_out: Mapping[str, Sequence[str]], splits: Mapping[str, float], groups: NDArray[Any], spread: str | None
) -> None:
    there = set(groups)
    seen: dict[str, str] = {}
    for name, values in held_out.items():
        if name not in splits:
            raise UserError(f"There is no split '{name}' to hold out values for.{nearest(name, splits)}")
        for value in values:
            if value not in there:
                raise UserError(f"There are no cells of '{value}' to hold out.{nearest(value, sorted(there))}")
            if value == spread:
                raise UserError(f"'{value}' is the control: every split gets its share of it. Hold out others.")
            if value in seen:
                raise UserError(f"'{value}' cannot be in the splits {seen[value]} and {name}.")
            seen[value] = name
