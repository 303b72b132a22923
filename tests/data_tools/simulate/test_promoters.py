"""Simulated promoters: order is in them, shares of words are not, and counts follow the order."""

from __future__ import annotations

import numpy as np

from data_tools.simulate.promoters import MOTIFS, simulate_promoters


def test_order_alone_tells_where_genes_are_expressed() -> None:
    made = simulate_promoters(genes=400, length=60, cells=100, seed=0)
    texts = made.fasta.split("\n")[1::2]
    assert {len(text) for text in texts} == {60}
    assert all(motif in text for text in texts for motif in MOTIFS)
    clear = [text.count(MOTIFS[0]) == text.count(MOTIFS[1]) == 1 for text in texts]
    before = np.array([text.index(MOTIFS[0]) < text.index(MOTIFS[1]) for text in texts])
    assert (before == made.first)[clear].all()
    counts, early = made.cells.X.toarray(), (made.cells.obs["cell_type"] == "early").to_numpy()
    higher = counts[early].mean(0) > counts[~early].mean(0)
    assert (higher == made.first).mean() > 0.99
    gene = np.array([text.count("AA") for text in texts])
    assert abs(gene[made.first].mean() - gene[~made.first].mean()) < 0.5
    again = simulate_promoters(genes=400, length=60, cells=100, seed=0)
    assert again.fasta == made.fasta
