"""Check, before the first step, that the splits of a store keep apart what they were meant to keep apart."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bgen.errors import UserError
from bgen.store.splits import group_names
from bgen.store.store import Store


def assert_no_leakage(store: Store) -> None:
    """Check that every cell is in one split, once, and that no group is in two.

    Groups are the values of the column that the store was split by. The control of perturbations is meant to be in all
    splits. Where values were held out by name, only they are bound to a split.

    Raises
    ------
    UserError
        Naming what is in two splits.
    """
    manifest = store.manifest
    codes = store.rows("split")
    names = list(manifest.splits)
    counts = np.bincount(codes, minlength=len(names))
    if len(codes) != len(store) or len(counts) > len(names) or counts.tolist() != list(manifest.splits.values()):
        raise UserError(f"The splits of {store.folder} are not those of its manifest. Build the store again.")
    _check_rows(store)
    if manifest.split_by is None:
        return
    column, values = store.column(manifest.split_by)
    texts = np.array([*column.categories, "nan"], dtype=object) if column.kind == "category" else None
    distinct, group = np.unique(values, return_inverse=True)
    labels = texts[distinct.astype(np.int64)] if texts is not None else group_names(pd.Series(distinct))
    held = {value: split for split, chosen in manifest.held_out.items() for value in chosen}
    is_control = manifest.split_by == manifest.roles.get("perturbation")
    in_split = np.zeros((len(distinct), len(names)), bool)
    in_split[group, codes] = True
    for label, there in zip(labels, in_split, strict=True):
        splits = [name for name, one in zip(names, there, strict=True) if one]
        if is_control and label == manifest.control:
            continue
        if manifest.held_out:
            if label in held and splits != [held[label]]:
                raise UserError(
                    f"{manifest.split_by} '{label}' was held out for {held[label]}, but is in {' and '.join(splits)}."
                    " Build the store again."
                )
        elif len(splits) > 1:
            raise UserError(
                f"{manifest.split_by} '{label}' is in the splits {' and '.join(splits)}, though {store.folder} was"
                " split by it. Build the store again."
            )


def _check_rows(store: Store) -> None:
    """Check that no row of an input is in the store twice."""
    source, row = store.source_of(np.arange(len(store)))
    key = source.astype(np.int64) * (int(row.max(initial=0)) + 1) + row
    key.sort()
    if twice := int((np.diff(key) == 0).sum()):
        raise UserError(f"{twice:,} rows of the inputs are in {store.folder} twice. Build the store again.")
