"""Random gene panels: a cell as it would have looked, had fewer genes been measured.

In training the encoder sees the genes of the panel while the decoder still explains the counts of all. So the latent
state depends less on which genes a user's cells have. A gene that is not measured looks like one that is not expressed.

Axes: B cells, NNZ stored counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgen.data.batch import CellBatch
from bgen.nn.gpu.draws import uniform
from bgen.nn.random import Stream, at, row_state, unit_from_bits


def on_panels(batch: CellBatch, counts: Tensor, share: float, most: float) -> Tensor:
    """Give a ``share`` of cells a panel each; return counts ``[NNZ]`` (zeros included), a pure function of the keys.

    A cell chosen with probability ``share`` loses each gene with probability ``p``, uniform in (0, ``most``). ``counts
    [NNZ]`` stand in for the batch's own.
    """
    choice = uniform(batch.keys, Stream.PANEL_CELL, 2)
    chosen, lost = choice[:, 0] < share, most * choice[:, 1]
    if counts.device.type != "cpu":
        return lose(batch, counts, torch.where(chosen, lost, 0.0))
    entries = chosen.index_select(0, batch.rows).nonzero().squeeze(1)
    rows = batch.rows.index_select(0, entries)
    # The position in the key's sequence is the gene, so a draw does not depend on which other genes are present.
    state = row_state(batch.keys, Stream.PANEL_GENE).index_select(0, rows)
    missing = unit_from_bits(at(state, batch.indices.index_select(0, entries).long())) < lost.index_select(0, rows)
    return counts.index_fill(0, entries[missing], 0)


def lose(batch: CellBatch, counts: Tensor, lost: Tensor) -> Tensor:
    """Let every cell lose each gene with its probability ``lost [B]``.

    All entries are drawn for, also of cells that lose none: to pick the others out, the host would wait for a GPU.
    """
    state = row_state(batch.keys, Stream.PANEL_GENE).index_select(0, batch.rows)
    return torch.where(unit_from_bits(at(state, batch.indices.long())) < lost.index_select(0, batch.rows), 0.0, counts)
