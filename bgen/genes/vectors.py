"""Vectors of genes, drugs or anything else by name, whether a model measures them or not.

Several sources stand side by side in one row: how a gene varies with others, what it regulates, the sets that it is in,
the structure of a drug, and files of any vectors. A name that a source does not know has zeros there.

Axes: G genes of a model, V names (the genes first, then others), E size of a vector, S sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import I64
from bgen.config.flow import MembersConfig
from bgen.errors import UserError
from bgen.genes.network import read_network
from bgen.genes.sets import read_gene_sets
from bgen.genes.structures import read_structures
from bgen.genes.table import find_genes

MOST_COMPONENTS = 32
"""Size of a row from gene sets or from structures, at most."""

MOST_SIZE = 8192
"""Numbers of a vector in a file, at most."""


@dataclass(frozen=True)
class NamedVectors:
    """What is known by name.

    Attributes
    ----------
    genes
        Gene table of the model (G rows).
    others
        Names beyond the genes.
    values
        float32 ``[V, E]``; a row of zeros says nothing.
    network
        float32 ``[E', G]``: maps the last E' numbers of a row to the genes that a regulator acts on; None: unknown.
    edges
        Edges of the network between genes of the model, and in its file.
    """

    genes: pd.DataFrame
    others: list[str]
    values: NDArray[np.float32]
    network: NDArray[np.float32] | None = None
    edges: tuple[int, int] = (0, 0)

    def rows(self, names: Sequence[str]) -> I64:
        """Return the row of each name: that of the gene with this id or symbol, or of another name; -1 without any."""
        return find_vectors(self.genes, self.others, self.values, names)


def find_vectors(genes: pd.DataFrame, others: Sequence[str], vectors: NDArray[np.float32], names: Sequence[str]) -> I64:
    """Return the row of each name among the V, or -1 if its vector ``[V, E]`` says nothing.

    A name is a gene by its id or symbol, as written or else whatever its case ("STAT1" is "Stat1"), or another name.
    """
    if not len(vectors):
        return np.full(len(names), -1, np.int64)
    rows = find_places(genes, others, names)
    return np.where((rows >= 0) & vectors[rows].any(axis=1), rows, -1)


def find_places(genes: pd.DataFrame, others: Sequence[str], names: Sequence[str]) -> I64:
    """Return the row of each name among the V, whether anything is known of it or not; -1 if it is not there."""
    rows = find_genes(genes, names)
    upper = {name.upper(): len(genes) + number for number, name in enumerate(others)}
    for column in ("symbol", "id"):
        upper |= {str(name).upper(): row for row, name in enumerate(genes[column]) if name}
    return np.where(rows >= 0, rows, np.array([upper.get(str(name).upper(), -1) for name in names], np.int64))


def named_vectors(config: MembersConfig, genes: pd.DataFrame, coexpression: NDArray[np.float32]) -> NamedVectors:
    """Put the vectors of all sources side by side; ``coexpression [G, E]`` is that of the training cells.

    Each source has root mean square norm sqrt(``components``), or 4 without co-expression, so that none drowns others.

    Raises
    ------
    UserError
        If a file is missing or is not what it should be.
    """
    norm = max(config.components, 16) ** 0.5
    tables: list[tuple[list[str], NDArray[np.float32]]] = []
    for path in config.vectors:
        tables.append(read_vectors(path))
    if config.sets is not None:
        sets = read_gene_sets(config.sets)
        of_sets = sorted(set().union(*sets.members.values()))
        tables.append((of_sets, components(sets.memberships(of_sets))[0]))
    for path in config.structures:
        drugs, bits = read_structures(path)
        tables.append((drugs, components(bits)[0]))
    names = dict.fromkeys(name for of_table, _ in tables for name in of_table)
    others = [name for name, row in zip(names, find_places(genes, (), list(names)), strict=True) if row < 0]
    V, blocks = len(genes) + len(others), []
    if coexpression.shape[1]:
        blocks.append(np.concatenate([coexpression, np.zeros((len(others), coexpression.shape[1]), np.float32)]))
    for of_table, table in tables:
        rows = find_places(genes, others, of_table)
        block = np.zeros((V, table.shape[1]), np.float32)
        block[rows[rows >= 0]] = scaled(table, norm)[rows >= 0]
        blocks.append(block)
    regulated, edges = None, (0, 0)
    if config.network is not None:  # last, so that its part of a row is known by its place
        network = read_network(config.network, genes)
        edges = network.weights.nnz, network.edges_in_file
        regulators, regulated = network.factors(norm)
        blocks.append(np.concatenate([regulators, np.zeros((len(others), regulators.shape[1]), np.float32)]))
    values = np.concatenate(blocks, axis=1) if blocks else np.zeros((V, 0), np.float32)
    return NamedVectors(genes, others, values, regulated, edges)


def read_vectors(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Read a CSV or TSV file with a name and its vector in each row, and a heading: names, and ``[rows, E]``.

    Raises
    ------
    UserError
        If it cannot be read, a value is no finite number, or a name comes twice.
    """
    if not path.is_file():
        raise UserError(f"Vectors by name: there is no file {path}.")
    try:
        table = pd.read_csv(path, sep="\t" if path.suffix.lower() in (".tsv", ".txt") else ",", index_col=0)
        values = table.to_numpy(np.float32)
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise UserError(
            f"{path} is no table of vectors: {str(error)[:200]}. It needs a heading, and rows of a name and numbers."
        ) from None
    names = [str(name) for name in table.index]
    if not values.size or values.shape[1] > MOST_SIZE:
        raise UserError(
            f"{path} holds {values.shape[0]} vectors of {values.shape[1]} numbers: 1 to {MOST_SIZE} are read."
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"{path}: the vector of '{names[int(np.flatnonzero(~np.isfinite(values).all(1))[0])]}' has gaps."
        )
    twice = pd.Index(names).duplicated()
    if twice.any():
        raise UserError(f"{path}: '{names[int(np.flatnonzero(twice)[0])]}' has two vectors.")
    return names, values


def components(rows: sp.csr_matrix, most: int = MOST_COMPONENTS) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ``rows [N, F]`` along their first singular vectors, ``[N, K]``, and these vectors, ``[F, K]``."""
    from scipy.sparse.linalg import svds  # half a second

    kept = min(most, min(rows.shape) - 1)
    if kept < 1:
        return np.asarray(rows.toarray(), np.float32), np.eye(rows.shape[1], dtype=np.float32)
    u, size, axes = svds(rows, k=kept, v0=np.random.default_rng(0).standard_normal(min(rows.shape)))
    return (u[:, ::-1] * size[::-1]).astype(np.float32), np.ascontiguousarray(axes[::-1].T, np.float32)


def scaled(values: NDArray[np.float32], norm: float) -> NDArray[np.float32]:
    """Give vectors the root mean square norm ``norm``; their mean, which says nothing, is left out."""
    mean, factor = scale_of(values, norm)
    return ((values - mean) * factor).astype(np.float32)


def scale_of(values: NDArray[np.float32], norm: float) -> tuple[NDArray[np.float32], float]:
    """Return the mean of vectors, and the factor that gives their deviations the root mean square norm ``norm``."""
    mean = values.mean(0)
    size = float(np.sqrt(((values - mean) ** 2).sum(1).mean()))
    return mean, norm / max(size, 1e-12)
