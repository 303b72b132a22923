"""Gene sets from a .gmt file: which sets each gene belongs to.

A line is a set: its name, a description, and its genes, between tabs (the format of MSigDB).

Axes: P names of genes, S sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from bgen.arrays import F64
from bgen.errors import UserError


@dataclass(frozen=True)
class GeneSets:
    """Name of each set to the names of its genes, in upper case."""

    members: dict[str, frozenset[str]]

    def rows(self, names: Sequence[str]) -> F64:
        """Return a row ``[P, S]`` for each gene: 1 / sqrt(size) for every set that holds it.

        So two genes of a small set are more alike than two of a large one.
        """
        rows: F64 = self.memberships(names).toarray()
        return rows

    def memberships(self, names: Sequence[str]) -> sp.csr_matrix:
        """Return the same as a sparse matrix: of many genes in many sets few are members."""
        places: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            places.setdefault(name.upper(), []).append(row)
        rows = [[row for gene in genes for row in places.get(gene, ())] for genes in self.members.values()]
        columns = np.repeat(np.arange(len(rows)), [len(found) for found in rows])
        weights = np.array([len(genes) ** -0.5 for genes in self.members.values()])
        numbers = np.fromiter((row for found in rows for row in found), np.int64)
        return sp.csr_matrix((weights[columns], (numbers, columns)), (len(names), len(rows)))


def read_gene_sets(path: Path) -> GeneSets:
    """Read a .gmt file.

    Raises
    ------
    UserError
        If it is not there, or a line is no set.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The gene sets {path} cannot be read: {error}.") from None
    members: dict[str, frozenset[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.rstrip("\n").split("\t")
        genes = frozenset(gene.strip().upper() for gene in rest[1:] if gene.strip())
        if not name.strip() or not genes:
            raise UserError(
                f"{path}, line {number}: a gene set is a name, a description and at least one gene, between tabs."
            )
        members[name] = members.get(name, frozenset()) | genes
    if not members:
        raise UserError(f"{path} holds no gene set.")
    return GeneSets(members)
