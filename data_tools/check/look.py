"""Find the matrix that holds the counts, and which gene each of its columns is; ``data check`` and every verb begin
with this.

Axes: N cells, M columns of the matrix, G its distinct genes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.check.counts import MatrixStatistics, gene_keys, is_part, scan
from data_tools.check.genes import Genes, MergeDuplicates, resolve_genes
from data_tools.inputs.source import Source

AUTO = "auto"
"""The name of the matrix when it has to be found."""

Progress = Callable[[Path, str], None]
"""Called with the file and the matrix about to be read."""


@dataclass(frozen=True)
class Looked:
    """A matrix that was read once: its name, its genes, and what its values are."""

    matrix: str
    genes: Genes
    statistics: MatrixStatistics


def in_order(source: Source) -> list[str]:
    """Return the names of a source's matrices in the order in which counts are looked for: X, raw/X, layers.

    Layers that hold a part of each cell's molecules come last.
    """
    names = [name for name in ("X", "raw/X") if name in source.matrices]
    layers = [name for name in source.matrices if name not in names]
    # "matrix" is velocyto's sum of the parts: counts, but less usual than a layer that is called so
    return names + sorted(layers, key=lambda name: (is_part(name), name == "layers/matrix"))


def look(
    source: Source,
    counts: str | None = None,
    *,
    gene_column: str | None = None,
    merge_duplicates: MergeDuplicates = "no",
    accept_unnamed: bool = False,
    synthetic: bool = False,
    progress: Progress | None = None,
) -> Looked:
    """Read the matrix that is asked for, and say what it is; the options are those of ``data check``.

    Parameters
    ----------
    counts
        "X", "raw/X", "layers/NAME"; "auto": the first that holds counts, except layers with a part of each cell's
        molecules; None: X, or else the first matrix. If none holds counts, the first is returned.

    Raises
    ------
    UserError
        If there is no such matrix, or the file breaks off.
    """
    names = in_order(source)
    if counts == AUTO:
        wanted = [name for name in names if not is_part(name)] or names[:1]
    else:
        wanted = names[:1] if counts is None else [source.matrix_name(counts)]
    looked = []
    for name in wanted:
        genes = resolve_genes(
            source.var(name), gene_column, merge_duplicates, accept_unnamed=accept_unnamed, synthetic=synthetic
        )
        if progress:
            progress(source.path, name)
        keys = gene_keys(genes.ids)[np.maximum(genes.gene_map, 0)] if len(genes.ids) else None
        looked.append(Looked(name, genes, scan(source, name, columns=genes.gene_map >= 0, gene_keys=keys)))
        if looked[-1].statistics.usable and looked[-1].statistics.nonzero:
            return looked[-1]
    return looked[0]


def counts_elsewhere(source: Source, looked: Looked, progress: Progress | None = None) -> list[str]:
    """Return the matrices that hold counts, in the order in which they are proposed, including the one looked at."""
    found = []
    for name in in_order(source):
        if name != looked.matrix and progress:
            progress(source.path, name)
        if looked.statistics.usable if name == looked.matrix else scan(source, name).usable:
            found.append(name)
    return found
