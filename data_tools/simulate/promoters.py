"""Simulated promoters in which order alone decides where a gene is expressed, and counts that follow.

Every promoter is random bases with two motifs in it, one of each kind, anywhere. Where the first kind stands before
the second, the gene is expressed in early cells, else in late ones. So all promoters have the same words, and nothing
but the order of two of them tells genes apart: shares of k-mers know nothing of it, and in another order of the
positions it is gone.

Axes: N cells, G genes, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

LETTERS = np.array(list("ACGT"))
MOTIFS = ("TATAAAAG", "CCGGAAGT")
EFFECT = 1.2
"""Logarithm of the ratio between cells where a gene is expressed and those where it is not, halved."""
TYPES = ("early", "late")
NOISE = 0.3
"""Standard deviation over genes of what neither motif tells."""
PER_GENE = 2.0
"""Counts of a gene in a cell, on average."""


@dataclass(frozen=True)
class Promoters:
    """What was simulated: cells, a FASTA text, and which genes have the first kind of motif first, bool ``[G]``."""

    cells: AnnData
    fasta: str
    first: NDArray[np.bool_]


def simulate_promoters(genes: int, length: int, cells: int, seed: int) -> Promoters:
    """Simulate promoters of ``length`` positions and counts of two types of cells."""
    rng = np.random.default_rng([seed, 63])
    words = [[LETTERS.tolist().index(letter) for letter in motif] for motif in MOTIFS]
    width = len(words[0])
    assert length >= 2 * width, "two motifs do not fit into a promoter"
    codes = rng.integers(4, size=(genes, length))
    first = rng.permutation(genes) < genes // 2
    for gene in range(genes):
        places = np.sort(rng.choice(length - 2 * width + 1, 2, replace=True)) + np.array([0, width])
        for place, word in zip(places, words if first[gene] else words[::-1], strict=True):
            codes[gene, place : place + width] = word
    early = np.arange(cells) < cells // 2
    moved = EFFECT * np.where(first, 1, -1) + NOISE * rng.standard_normal(genes)
    level = rng.normal(0, 0.5, genes)
    rate = np.exp(level + np.where(early, 1, -1)[:, None] * moved)
    rate *= PER_GENE * genes / rate.sum(1, keepdims=True)
    names = [f"gene{number:05d}" for number in range(genes)]
    counted = AnnData(
        sp.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame({"cell_type": np.where(early, *TYPES)}, index=[f"cell{i}" for i in range(cells)]),
        var=pd.DataFrame({"gene_symbol": names}, index=[f"SIM{name}" for name in names]),
        uns={"organism": "synthetic"},
    )
    texts = ("".join(row) for row in LETTERS[codes])
    fasta = "".join(f">{name} simulated\n{text}\n" for name, text in zip(names, texts, strict=True))
    return Promoters(counted, fasta, first)
