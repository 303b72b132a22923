"""Vectors of genes from their sequences: trained on genes that were counted, made for all that have a sequence.

    sequence -> vector -> level, and components of the deviations over groups of cells

The vectors are frozen then, and a gene table (``vectors.files``) makes rows of genes from them.

Axes: N cells, G genes, S sequences, L positions, F size of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from bgen.arrays import F32
from bgen.config.sequences import SequenceConfig, SequenceTraining
from bgen.errors import UserError, nearest
from bgen.files import require_new_file, write_result
from bgen.genes.profiles import Profiles, profiles
from bgen.genes.sequences import Sequences, read_fasta
from bgen.models.sequences.regression import fit_sequences
from bgen.progress import Say
from bgen.tasks.user_cells import Cells, read_user_data

COMPONENTS = 4
"""Of the deviations over groups that are told from sequences."""
LEAST_GENES = 100
"""Genes with a sequence and counts, at least: of fewer nothing general is learnt."""


@dataclass(frozen=True)
class Counted:
    """Cells with their counts, and what they tell of genes.

    Attributes
    ----------
    genes
        ``id`` and ``symbol`` of the G genes.
    counts
        CSR ``[N, G]``.
    labels
        Group of each cell ``[N]``.
    profiles
        Profiles of the genes over the groups.
    organism
        As the data says; empty if it does not.
    """

    genes: pd.DataFrame
    counts: sp.csr_matrix
    labels: NDArray[np.str_]
    profiles: Profiles
    organism: str


def count_genes(cells: Cells, by: Sequence[str]) -> Counted:
    """Read cells and return them with the profiles of their genes; groups are combinations of the obs columns ``by``.

    Raises
    ------
    UserError
        If the cells cannot be used, a column is not there, or groups are too small.
    """
    data = read_user_data(cells)
    for name in by:
        if name not in data.adata.obs:
            raise UserError(f"The cells have no obs column '{name}'.{nearest(name, data.adata.obs.columns)}")
    genes = pd.DataFrame({"id": data.genes.ids.tolist(), "symbol": data.genes.symbols.tolist(), "cells": 0})
    counts = data.match(genes, {}).counts
    labels = data.adata.obs[list(by)].astype(str).agg(" ".join, axis=1).to_numpy(str)
    organism = str(data.adata.uns.get("organism", ""))
    return Counted(genes, counts, labels, profiles(counts, labels), organism)


def gene_vectors(
    fasta: Path,
    cells: Cells,
    out: Path,
    by: Sequence[str],
    config: SequenceConfig,
    training: SequenceTraining,
    *,
    seed: int,
    say: Say,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train on the genes of ``cells`` that have a sequence in ``fasta``; write the vectors of all sequences, CSV.

    Raises
    ------
    UserError
        If a file cannot be used, or too few genes have a sequence.
    """
    require_new_file(out)
    sequences = read_fasta(fasta)
    counted = count_genes(cells, by)
    rows, usable = sequence_rows(sequences, counted)
    say(sequences.sentence(rows))
    targets, weights = counted.profiles.targets(usable, COMPONENTS)
    codes = sequences.codes[rows[usable]]
    fitted = fit_sequences(codes, targets[usable], weights, config, training, seed, progress)
    write_vectors(out, sequences.names, fitted.vectors(sequences.codes))
    say(f"Vectors of {len(sequences.names):,} sequences, learnt from {len(usable):,} genes: {out}")


def sequence_rows(sequences: Sequences, counted: Counted) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row of each gene's sequence, -1 for none, and the genes that have one and are seen in cells enough.

    Raises
    ------
    UserError
        If these are too few.
    """
    rows = sequences.rows(counted.genes)
    usable = np.flatnonzero((rows >= 0) & counted.profiles.seen)
    if len(usable) < LEAST_GENES:
        names = counted.genes["symbol"].where(counted.genes["symbol"] != "", counted.genes["id"])
        raise UserError(
            f"{len(usable)} genes have a sequence and are expressed by one of a hundred cells; {LEAST_GENES} are"
            f" needed. Sequences are named like {', '.join(sequences.names[:3])}, genes like {', '.join(names[:3])}."
        )
    return rows, usable


def write_vectors(path: Path, names: Sequence[str], vectors: F32) -> None:
    """Write vectors ``[S, F]`` as a file that ``vectors.files`` takes: a name and its vector in each row."""
    table = pd.DataFrame(
        vectors, index=pd.Index(names, name="name"), columns=[f"x{i}" for i in range(vectors.shape[1])]
    )
    write_result(path, table.to_csv(float_format="%.6g"))
