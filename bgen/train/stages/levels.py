"""After training a VAE: every gene to its best level, over training cells that are shared among the ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bgen.data.loader import CountReader
from bgen.distributed.world import World, all_sum
from bgen.models.vae.vae import VAE
from bgen.order.keys import hash_keys
from bgen.train.stages.whitening import keyed_sample

LEVEL_CELLS = 262_144
"""Training cells over which the levels are fitted, at most."""

LEAST_DRAWS = 8_192
"""Draws from posteriors that a step takes, at least: several of each cell where there are fewer cells."""

STEPS = 3
"""Newton steps; the draws are the same in each, so that they converge."""

ENTRIES = 1 << 22
"""Cells of a batch times genes, at most."""


def fit_levels(vae: VAE, reader: CountReader, split: str, world: World) -> None:
    """Fit the genes' levels (:mod:`bgen.models.vae.levels`) on (at most :data:`LEVEL_CELLS`) cells of a split."""
    cells = keyed_sample(reader.store.cells_of_split(split), LEVEL_CELLS, 0)
    parts = np.array_split(cells, -(-len(cells) // max(1, min(1024, ENTRIES // vae.n_genes))))
    for _ in range(STEPS):
        stats = vae.level_stats()
        for part in parts[world.rank :: world.size]:
            batch = reader.read_cells(part).to(world.device)
            for draw in range(-(-LEAST_DRAWS // len(cells))):
                keys = torch.from_numpy(hash_keys(draw, part).view(np.int64)).to(world.device)
                vae.accumulate_levels(stats, replace(batch, keys=keys))
        stats.sums.copy_(all_sum(stats.sums.cpu()))
        vae.fit_levels(stats)
