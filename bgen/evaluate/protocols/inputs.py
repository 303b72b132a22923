"""What every protocol requires of its AnnData: the same genes in the same order, raw counts, known columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from bgen.errors import UserError, nearest

JOINT = " | "
"""Between the values of several conditions in one label."""
UNLABELLED = "(unlabelled)"


@dataclass(frozen=True)
class Cells:
    """One set of cells.

    Attributes
    ----------
    counts
        Raw counts [N, G].
    types
        What cells are matched by, str [N]: the type, or all categorical conditions together.
    labels, numbers
        Conditions by column: str and float64 [N].
    """

    counts: sparse.csr_matrix
    types: NDArray[np.str_] | None
    labels: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    numbers: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def take(self, rows: NDArray[np.intp]) -> Cells:
        """Return some of the cells."""
        return Cells(
            self.counts[rows],
            None if self.types is None else self.types[rows],
            {name: column[rows] for name, column in self.labels.items()},
            {name: column[rows] for name, column in self.numbers.items()},
        )


def read_cells(
    sets: Mapping[str, AnnData],
    cell_type: str | None,
    typed: tuple[str, ...],
    conditions: Sequence[str] = (),
) -> dict[str, Cells]:
    """Check named sets of cells together and return their counts.

    The first set defines the genes. Sets named in ``typed`` must have the obs column ``cell_type``; the others may.
    ``conditions`` are further columns, of which those count that every set has: numbers as numbers, all else as labels.
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
    shared = [c for c in dict.fromkeys(conditions) if c != cell_type and all(c in cells.obs for cells in sets.values())]
    numbers = [c for c in shared if all(_is_number(cells.obs[c]) for cells in sets.values())]
    named = [c for c in shared if c not in numbers]
    everywhere = cell_type is not None and all(cell_type in cells.obs for cells in sets.values())
    found = {}
    for name, cells in sets.items():
        labels = {c: _labels(cells, c) for c in ([str(cell_type), *named] if everywhere else named)}
        types = cell_types(cells, cell_type)
        if labels and (everywhere or cell_type is None):
            columns = list(labels.values())
            types = np.array([JOINT.join(values) for values in zip(*columns, strict=True)]).astype(str)
        found[name] = Cells(counts[name], types, labels, {c: cells.obs[c].to_numpy(np.float64) for c in numbers})
    return found


def _is_number(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column))


def cell_types(cells: AnnData, cell_type: str | None) -> NDArray[np.str_] | None:
    """Return the column as strings [N], missing values named; None if no column is named or it is not there."""
    if cell_type is None or cell_type not in cells.obs:
        return None
    return _labels(cells, cell_type)


def _labels(cells: AnnData, name: str) -> NDArray[np.str_]:
    column: pd.Series = cells.obs[name].astype(object)
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
