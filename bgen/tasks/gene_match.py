"""Which gene of a model each column of a matrix is, and counts by the model's genes.

Axes: N rows of a block, M columns of the matrix, V distinct genes of the data, G genes of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.errors import UserError
from bgen.genes.table import match_names
from data_tools.check.findings import Rounding
from data_tools.check.genes import ID_COLUMNS, SYMBOL_COLUMNS, Genes, resolve_genes

FLOOR = 0.8
"""Share of the molecules of an average cell of the model that must be of genes that data has, unless the user says
otherwise."""


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """The genes of some data beside those of a model.

    Attributes
    ----------
    places
        The model's gene that each distinct gene of the data is ``[V]``, -1 for none.
    way
        How they were matched, one of :data:`bgen.genes.table.WAYS`.
    of_column
        The model's gene that each column of the matrix is ``[M]``, -1 for none.
    known
        Which of the model's genes the data has ``[G]``.
    held
        Share of an average cell's molecules that these hold, as the model expects them.
    """

    places: I64
    way: str
    of_column: I64
    known: NDArray[np.bool_]
    held: float

    @property
    def enough(self) -> int:
        """How many of the model's genes the data has."""
        return int(self.known.sum())


def match_genes(genes: pd.DataFrame, own: Genes, floor: float, expected: NDArray[np.float32] | None) -> GeneMatch:
    """Match the genes of some data to a model's gene table; :func:`too_few` says when these are not enough.

    Parameters
    ----------
    expected
        ``[G]``: the share of an average cell's molecules that the model expects of each gene; None: all the same.
    """
    places, way = match_names(genes, own.ids.tolist(), own.symbols.tolist(), enough=max(floor, FLOOR))
    known = np.zeros(len(genes), bool)
    known[places[places >= 0]] = True
    held = float(known.mean() if expected is None else expected[known].sum(dtype=np.float64))
    return GeneMatch(places, way, np.append(places, -1)[own.gene_map], known, held)


def by_gene(
    block: sp.csr_matrix, of_column: I64, n_genes: int, rounding: Rounding, named: NDArray[np.bool_]
) -> tuple[sp.csr_matrix, float]:
    """Return rows of a matrix ``[N, M]`` by gene: CSR float32 ``[N, n_genes]``, and the sum of all their counts.

    Parameters
    ----------
    of_column
        The gene of each column ``[M]``, -1 for one that is left out. Columns of one gene are added up.
    named
        Columns that count for the sum ``[M]``.
    """
    data = np.rint(block.data) if rounding == "nearest" else block.data
    total = float(data[named[block.indices]].sum(dtype=np.float64))
    gene = of_column[block.indices]
    kept = gene >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[block.indptr]
    rows = sp.csr_matrix((data[kept].astype(np.float32), gene[kept], indptr), shape=(block.shape[0], n_genes))
    rows.sum_duplicates()
    rows.eliminate_zeros()
    return rows, total


def too_few(
    genes: pd.DataFrame,
    own: Genes,
    var: pd.DataFrame,
    found: GeneMatch,
    expected: NDArray[np.float32] | None,
    *,
    floor: float,
    gene_column: str | None,
    molecules: float | None = None,
) -> UserError:
    """Return the error for data that lacks too many of a model's genes, with the column of ``var`` that has them.

    Parameters
    ----------
    molecules
        Share of the data's molecules that are of genes that the model knows; None: not known.
    """
    shares = np.full(len(genes), 1 / max(len(genes), 1)) if expected is None else expected
    better = ""
    for column in (*ID_COLUMNS, *SYMBOL_COLUMNS):
        if column in var and column != gene_column:
            other = resolve_genes(var, column, "sum", accept_unnamed=True)
            places, _ = match_names(genes, other.ids.tolist(), other.symbols.tolist())
            if shares[np.unique(places[places >= 0])].sum() >= floor:
                better = f" var['{column}'] has enough of them: --gene-column {column}."
                break
    share = found.enough / len(genes)
    weight = (
        "" if expected is None else f", which hold {found.held:.0%} of the molecules of an average cell of the model"
    )
    hold = "" if molecules is None else f" Genes that the model knows hold {molecules:.0%} of the data's molecules."
    return UserError(
        f"the data has {found.enough:,} of the {len(genes):,} genes of the model ({share:.0%}){weight}. At least"
        f" {floor:.0%} are needed; --floor lowers that. The model's ids look like"
        f" {', '.join(genes['id'][:3])}; those of the data like {', '.join(own.ids[:3])}.{hold}{better}"
    )
