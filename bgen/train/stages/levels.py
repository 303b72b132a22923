"""After training: every gene to its level (:mod:`bgen.models.vae.levels`), over training cells shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bgen.config.flow import SampleConfig
from bgen.data.batch import CellBatch
from bgen.data.loader import CountReader
from bgen.distributed.world import World, all_sum
from bgen.models.codec import Codec, CountsCodec
from bgen.models.generators.latent_flow import LatentFlow
from bgen.models.vae.levels import LevelStats
from bgen.models.vae.vae import VAE
from bgen.nn.random import mix
from bgen.order.keys import hash_keys

EXPLAINED_CELLS = 262_144
"""Training cells whose likelihood is taken, at most."""

EXPLAINED_DRAWS = 8_192
"""Draws from their posteriors that a step takes, at least: several of each cell where there are fewer cells."""

COMPARED_CELLS = 65_536
"""Training cells that generated ones are compared with, at most."""

COMPARED_LATENTS = 16_384
"""Latents that are generated, at least: several under the conditions of each cell where there are fewer cells."""

COMPARED_NUMBERS = 1 << 26
"""Cells times dimensions of the latents that are kept for the second step, at most."""

COMPARED_COUNTS = 2
"""Cells that are drawn from each latent. They are cheaper than latents, and most of a gene's chance is theirs."""

GENERATION = 1
"""Seed of the keys of generated cells, apart from those that a user's cells have."""

EXPLAINED_STEPS, COMPARED_STEPS = 3, 2
"""Newton steps; the draws are the same in each, so that they converge. A trained VAE is near what is compared."""

ENTRIES = 1 << 22
"""Cells of a batch times genes, at most."""


def fit_levels(vae: VAE, reader: CountReader, split: str, world: World) -> None:
    """Let a VAE explain (at most :data:`EXPLAINED_CELLS`) cells of a split best."""

    def sweep(stats: LevelStats) -> None:
        for batch in _batches(vae, reader, split, world, EXPLAINED_CELLS, EXPLAINED_DRAWS):
            vae.accumulate_levels(stats, batch)

    _newton(vae, sweep, EXPLAINED_STEPS)


def fit_generated_levels(
    flow: LatentFlow, settings: SampleConfig, reader: CountReader, split: str, world: World
) -> None:
    """Let cells that a flow generates have the genes' means of (at most :data:`COMPARED_CELLS`) cells of a split.

    Each cell is generated under the conditions of a training cell, as :func:`bgen.tasks.generate.generate_cells` would
    with these settings, library size included. Latents do not depend on the levels, so they are generated once.
    """
    codec = flow.vae
    assert isinstance(codec, CountsCodec)
    latents: list[Tensor] = []
    most = min(COMPARED_CELLS, max(1, COMPARED_NUMBERS // codec.size))

    def sweep(stats: LevelStats) -> None:
        for place, batch in enumerate(_batches(codec, reader, split, world, most, COMPARED_LATENTS, GENERATION)):
            if place == len(latents):
                conditions = {name: batch.obs[name] for name in flow.conditions.names}
                latents.append(flow.sample(conditions, len(batch), batch.keys, settings).cpu())
            for draw in range(COMPARED_COUNTS):
                again = replace(batch, keys=mix(batch.keys + draw))
                codec.accumulate_generated_levels(stats, again, latents[place].to(world.device))

    _newton(codec, sweep, COMPARED_STEPS)


def _newton(codec: CountsCodec, sweep: Callable[[LevelStats], None], steps: int) -> None:
    """Take Newton steps, each after a ``sweep`` that adds this rank's share of the cells."""
    for _ in range(steps):
        stats = codec.level_stats()
        sweep(stats)
        stats.sums.copy_(all_sum(stats.sums.cpu()))
        codec.fit_levels(stats)


def _batches(
    codec: Codec, reader: CountReader, split: str, world: World, most: int, draws: int, *seed: int
) -> Iterator[CellBatch]:
    """Yield this rank's share of at most ``most`` cells, each as often as makes ``draws`` in all, with other keys."""
    cells = reader.store.sample(reader.store.split(split), most, 0)
    parts = np.array_split(cells, -(-len(cells) // max(1, min(1024, ENTRIES // codec.n_genes))))
    for part in parts[world.rank :: world.size]:
        batch = reader.read_cells(part).to(world.device)
        for draw in range(-(-draws // len(cells))):
            keys = torch.from_numpy(hash_keys(*seed, draw, part).view(np.int64)).to(world.device)
            yield replace(batch, keys=keys)
