"""Mean and spread of a codec's states over training cells, shared among the ranks: the last step of training a VAE."""

from __future__ import annotations

import numpy as np
import torch

from bgen.data.loader import CountReader
from bgen.distributed.world import World, all_sum, gather
from bgen.models.codec import CountsCodec

WHITENING_CELLS = 262_144
"""Training cells that the latents' mean and standard deviation are taken over, at most."""


def fit_whitening(codec: CountsCodec, reader: CountReader, split: str, world: World) -> None:
    """Fit a codec's whitening on (at most :data:`WHITENING_CELLS`) cells of a split; every rank takes a share."""
    cells = reader.store.sample(reader.store.split(split), WHITENING_CELLS, 0)
    stats = codec.whitening_stats()
    for part in np.array_split(cells, -(-len(cells) // 1024))[world.rank :: world.size]:
        codec.accumulate_whitening(stats, reader.read_cells(part).to(world.device))
    stats.sums.copy_(all_sum(stats.sums.cpu()))
    stats.bounds.copy_(torch.stack(gather(stats.bounds.cpu())).amax(dim=0))
    codec.fit_whitening(stats)
