"""What every protocol requires of its AnnData: the same genes in the same order, raw counts, known columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from bgen.errors import UserError, nearest

UNLABELLED = "(unlabelled)"


@dataclass(frozen=True)
class Cells:
    """Raw counts [N, G] of one set of cells, and their types (str [N]) where a column was named and is there."""

    counts: sparse.csr_matrix
    types: NDArray[np.str_] | None

    def __len__(self) -> int:
        return int(self.counts.shape[0])


def read_cells(sets: Mapping[str, AnnData], cell_type: str | None, typed: tuple[str, ...]) -> dict[str, Cells]:
    """Check named sets of cells together and return their counts.

    The first set defines the genes. Sets named in ``typed`` must have the obs column ``cell_type``; the others may.
    All findings are raised in one UserError.
    """
    reference_name, reference = next(iter(sets.items()))
    problems: list[str] = []
    counts: dict[str, sparse.csr_matrix] = {}
    for name, cells in sets.items():
        problems += _gene_problems(name, cells, reference_name, reference)
        counts[name] = _matrix(cells)
        problems += _count_problems(name, counts[name])
        if cell_type is not None and name in typed and cell_type not in cells.obs:
            problems.append(f"{name}: no column '{cell_type}' in obs.{nearest(cell_type, cells.obs.columns)}")
    if problems:
        raise UserError("\n".join(problems))
    return {name: Cells(counts[name], cell_types(cells, cell_type)) for name, cells in sets.items()}


def cell_types(cells: AnnData, cell_type: str | None) -> NDArray[np.str_] | None:
    """Return the column as strings [N], missing values named; None if no column is named or it is not there."""
    if cell_type is None or cell_type not in cells.obs:
        return None
    column: pd.Series = cells.obs[cell_type].astype(object)
    return column.where(column.notna(), UNLABELLED).to_numpy().astype(str)


def _matrix(cells: AnnData) -> sparse.csr_matrix:
    x = cells.to_memory().X if cells.isbacked else cells.X
    counts = sparse.csr_matrix(x, copy=not isinstance(x, np.ndarray))
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _count_problems(name: str, counts: sparse.csr_matrix) -> list[str]:
    data = counts.data
    if data.dtype.kind in "biu":
        wrong = data < 0
    else:
        wrong = ~np.isfinite(data) | (data < 0) | (data != np.rint(data))
    if not wrong.any():
        return []
    example = data[int(np.argmax(wrong))]
    return [
        f"{name}: X holds {int(wrong.sum()):,} values that are not counts, such as {example:.4g}. "
        f"Evaluation needs raw non-negative integers: put them into X (often layers['counts'] or raw.X)."
    ]


def _gene_problems(name: str, cells: AnnData, reference_name: str, reference: AnnData) -> list[str]:
    genes, expected = cells.var_names, reference.var_names
    if not genes.is_unique:
        twice = genes[genes.duplicated()].unique()
        return [f"{name}: {len(twice)} gene ids occur more than once ({_some(twice)}). Use unique ids as var_names."]
    if genes.equals(expected):
        return []
    missing, extra = expected.difference(genes, sort=False), genes.difference(expected, sort=False)
    if len(missing) == 0 and len(extra) == 0:
        first = int(np.argmax(np.asarray(genes) != np.asarray(expected)))
        return [
            f"{name}: the genes are those of {reference_name} in another order (position {first}: '{genes[first]}' "
            f"instead of '{expected[first]}'). Reorder with {name} = {name}[:, {reference_name}.var_names]."
        ]
    differences = [f"lacks {len(missing)} of {len(expected)} genes ({_some(missing)})"] if len(missing) else []
    differences += [f"has {len(extra)} other genes ({_some(extra)})"] if len(extra) else []
    shared = len(expected) - len(missing)
    fix = (
        f"Restrict all sets to the {shared} shared genes, in one order."
        if shared
        else "No gene is shared: are the ids of another kind (symbols, Ensembl) or organism?"
    )
    return [f"{name}: {' and '.join(differences)}, compared with {reference_name}. {fix}"]


def _some(names: pd.Index) -> str:
    shown = ", ".join(str(name) for name in names[:3])
    return shown + (", ..." if len(names) > 3 else "")
