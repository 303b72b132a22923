"""Rows of a regulatory network as embeddings of genes, so that targets that no screen perturbed can be predicted.

    S = A + c A^2 + c^2 A^3,   S ~ U V

A_gh is the weight with which gene g regulates gene h; S adds the effect through one or two genes in between, each of
which passes on the share c = 1/4: the slope of a saturating response at half saturation. The rows of U are embeddings:
genes that regulate the same genes have similar ones. U V tells which genes should respond when a gene is perturbed.

Axes: G genes, E size of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from bgen.errors import UserError
from bgen.genes.table import find_genes

PASSED_ON = 0.25
COMPONENTS = 64
"""E, at most."""

NAMES = {"source": ("source", "tf", "regulator"), "target": ("target", "gene"), "weight": ("weight", "mor")}
"""Column names that are understood; without weights every edge counts 1."""


@dataclass(frozen=True)
class Network:
    """A network between a model's genes: A ``[G, G]`` (row regulates column) and the edges that its file holds."""

    weights: sp.csr_matrix
    edges_in_file: int

    def sentence(self, targets: NDArray[np.int64]) -> str:
        """Say how much of the network is of use for the target genes ``[P]`` of a screen (-1: no gene)."""
        regulating = np.diff(self.weights.indptr) > 0
        known = targets[targets >= 0]
        return (
            f"Network: {self.weights.nnz:,} of {self.edges_in_file:,} edges join genes of the model;"
            f" {int(regulating[known].sum())} of the {len(known)} perturbed genes regulate others in it."
        )

    def factors(self, size: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return embeddings U ``[G, E]``, those of regulators with root mean square norm ``size``, and V ``[E, G]``."""
        direct = self.weights.astype(np.float64)
        once = direct @ direct
        total = direct + PASSED_ON * once + PASSED_ON**2 * (once @ direct)
        regulators = np.flatnonzero(np.diff(total.indptr))
        count = min(COMPONENTS, len(regulators))
        if count < len(regulators):
            u, s, v = svds(total[regulators], k=count, v0=np.ones(min(len(regulators), total.shape[1])))
        else:
            u, s, v = np.linalg.svd(total[regulators].toarray(), full_matrices=False)
        rows = np.zeros((total.shape[0], count), np.float32)
        scale = size / np.sqrt((s**2).sum() / len(regulators))
        rows[regulators] = u * s * scale
        return rows, (v / scale).astype(np.float32)


def read_edges(path: Path) -> pd.DataFrame:
    """Read a CSV of edges: columns source, target (text) and weight (1 where the file has none).

    Raises
    ------
    UserError
        If the file or a column is missing, or a weight is no number.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    table = pd.read_csv(path)
    lower = {str(name).lower(): name for name in table.columns}
    found = {kind: next((lower[name] for name in names if name in lower), None) for kind, names in NAMES.items()}
    for kind in ("source", "target"):
        if found[kind] is None:
            raise UserError(
                f"{path} has no column {kind} ({' or '.join(NAMES[kind])}); it has"
                f" {', '.join(map(str, table.columns))}."
            )
    weight = np.ones(len(table))
    if found["weight"] is not None:
        weight = pd.to_numeric(table[found["weight"]], errors="coerce").to_numpy(np.float64)
        if not np.isfinite(weight).all():
            raise UserError(f"{path}: the column {found['weight']} must hold a number for every edge.")
    ends = {kind: table[found[kind]].astype(str) for kind in ("source", "target")}
    return pd.DataFrame({**ends, "weight": weight})


def read_network(path: Path, genes: pd.DataFrame) -> Network:
    """Read a CSV of edges (:func:`read_edges`) between genes of a model, by id or symbol.

    Raises
    ------
    UserError
        If the file cannot be used, or no edge joins genes of the model.
    """
    table = read_edges(path)
    source, target = (find_genes(genes, table[kind].tolist()) for kind in ("source", "target"))
    weight = table["weight"].to_numpy()
    joined = (source >= 0) & (target >= 0) & (source != target) & (weight != 0)
    if not joined.any():
        raise UserError(
            f"{path}: no edge joins genes of the model. Its genes look like"
            f" {', '.join(table['source'].head(3))}; those of the model like"
            f" {', '.join(genes['id'].head(3))}."
        )
    matrix = sp.coo_matrix((weight[joined], (source[joined], target[joined])), shape=(len(genes), len(genes)))
    return Network(matrix.tocsr(), len(table))
